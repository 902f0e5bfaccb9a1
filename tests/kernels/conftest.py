"""The programs run in an interpreter that wastes no time."""

from tests.kernels.interpreter import prepare_once_per_launch

prepare_once_per_launch()
