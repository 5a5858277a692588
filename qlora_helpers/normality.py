"""How near a set of values is to a normal distribution."""

import torch


def qq_correlation(values: torch.Tensor) -> float:
    """Correlation of the sorted values with the quantiles of a normal distribution; 1 for a perfect one.

    The quantiles are taken at (k - 3/8) / (n + 1/4), k = 1 ... n (Blom).
    """
    ordered = values.flatten().double().sort().values
    n = ordered.numel()
    places = (torch.arange(1, n + 1, dtype=torch.float64) - 0.375) / (n + 0.25)
    quantiles = torch.special.ndtri(places)
    return torch.corrcoef(torch.stack([ordered, quantiles]))[0, 1].item()


def excess_kurtosis(values: torch.Tensor) -> float:
    """Fourth standardised moment minus 3: 0 for a normal distribution, positive for heavy tails."""
    values = values.flatten().double()
    centred = values - values.mean()
    return ((centred**4).mean() / (centred**2).mean() ** 2 - 3).item()
