"""The frozen switches of a model, as a part of its state."""

from __future__ import annotations

from typing import Any

from torch import nn

from syncbn.surgery.freeze import apply_switches, frozen_switches


class FrozenSwitches:
    """The frozen switches of a model's modules, which its state dict does not carry."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())

    def state_dict(self) -> dict[str, Any]:
        """The frozen ones of "stats", "affine" and "weights" of every module that has one."""
        switches = {name: sorted(frozen_switches(module)) for name, module in self._modules.items()}
        return {name: frozen for name, frozen in switches.items() if frozen}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Freezes and unfreezes accordingly."""
        targets = {name: set(state_dict.get(name, ())) for name in self._modules}
        apply_switches(
            self._modules[""],
            [
                (module, switch, switch in targets[name])
                for name, module in self._modules.items()
                for switch in sorted(targets[name] ^ frozen_switches(module))
            ],
        )
