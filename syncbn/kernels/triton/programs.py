"""The Triton kernels, and `launch`, which starts them, in one namespace. Importing this module imports Triton."""

from syncbn.kernels.triton.elementwise import backward_elementwise as backward_elementwise
from syncbn.kernels.triton.elementwise import normalize as normalize
from syncbn.kernels.triton.launch import launch as launch
from syncbn.kernels.triton.reductions import backward_sums as backward_sums
from syncbn.kernels.triton.reductions import combine_and_finish as combine_and_finish
from syncbn.kernels.triton.reductions import combine_backward_sums as combine_backward_sums
from syncbn.kernels.triton.reductions import combine_moments as combine_moments
from syncbn.kernels.triton.reductions import finish as finish
from syncbn.kernels.triton.reductions import moments as moments
from syncbn.kernels.triton.whole_channels import backward_channel as backward_channel
from syncbn.kernels.triton.whole_channels import forward_channel as forward_channel
