"""The custom operators of batch normalization, each with an implementation per device.

Importing this package defines the operators (`torch.ops.syncbn.*`); `reference` implements them for every device.
"""

from syncbn.kernels import operators as operators
