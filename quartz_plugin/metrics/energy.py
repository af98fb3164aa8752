"""Energy of an inference by a profile; the profiles are in :mod:`quartz_plugin.costs.energy`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quartz_plugin.costs.energy import EnergyProfile
from quartz_plugin.metrics.per_layer import CountMetric
from quartz_plugin.network import SpikingNetwork


class EnergyEstimate(CountMetric):
    """Energy of an inference, mean over images: counts times the energy of each in a profile.

    ``compute`` gives a dict: ``energy_PROFILE`` in the profile's unit (J, or relative), and each layer's share under
    ``energy_PROFILE/LAYER``; "input" pays for its spikes.

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.
    profile : EnergyProfile or several
        Energy of each count.

    Raises
    ------
    TypeError, ValueError
        For something else than a profile, one without energies for spiking networks or with unknown counts, none, or
        two of a name.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> from quartz_plugin.costs import HOROWITZ_FLOAT32
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4), t_max=16)
    >>> metric = EnergyEstimate(snn, HOROWITZ_FLOAT32)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> list(metric.compute())
    ['energy_45nm_float32', 'energy_45nm_float32/input', 'energy_45nm_float32/1', 'energy_45nm_float32/output']
    """

    def __init__(
        self,
        network: SpikingNetwork,
        profile: EnergyProfile | list[EnergyProfile] | tuple[EnergyProfile, ...],
        **kwargs: Any,
    ) -> None:
        self.profiles: list[EnergyProfile] = list(profile) if isinstance(profile, (list, tuple)) else [profile]
        for each in self.profiles:
            if not isinstance(each, EnergyProfile):
                raise TypeError(f"profile must be an EnergyProfile, got {each!r}")
            if not each.spiking:
                raise ValueError(f"profile {each.name!r} has no energies for spiking networks")
        names = [each.name for each in self.profiles]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"profile must be one, or several of different names, got {names}")
        counts = list(dict.fromkeys(count for each in self.profiles for count in each.spiking))
        super().__init__(network, counts, with_input=True, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Energies, float64; see the class."""
        sums = {quantity: self.total(quantity).double() for quantity in self.quantities}
        energies: dict[str, Tensor] = {}
        for profile in self.profiles:
            name, by_layer = profile.figure, profile.energy(sums) / self.images
            energies |= {name: by_layer.sum(), **self.by_layer(name, by_layer)}
        return energies
