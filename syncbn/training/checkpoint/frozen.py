"""Saving and restoring which statistics and parameters of a model are frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.surgery.freeze import apply_switches, frozen_switches


class FrozenSwitches:
    """The frozen switches ("stats", "affine", "weights") of a model's modules, which are not in its state dict."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())

    def state_dict(self) -> dict[str, Any]:
        """Maps the name of every module with a frozen switch to the sorted list of its frozen switches."""
        switches = {name: sorted(frozen_switches(module)) for name, module in self._modules.items()}
        return {name: frozen for name, frozen in switches.items() if frozen}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Freezes and unfreezes the model's modules so that their switches are those of the state.

        Raises:
            ValueError: a module that the model does not have, or one without statistics to freeze.
        """
        if unknown := sorted(state_dict.keys() - self._modules.keys()):
            raise ValueError(f"it has frozen what the model does not have, {unknown[0]!r}")
        targets = {name: set(state_dict.get(name, ())) for name in self._modules}
        for name, frozen in targets.items():
            if "stats" in frozen and not _has_statistics(self._modules[name]):
                raise ValueError(f"it has frozen the statistics of {name!r}, which has none")
        apply_switches(
            self._modules[""],
            [
                (module, switch, switch in targets[name])
                for name, module in self._modules.items()
                for switch in sorted(targets[name] ^ frozen_switches(module))
            ],
        )


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, SyncBatchNorm) and module.running_mean is not None
