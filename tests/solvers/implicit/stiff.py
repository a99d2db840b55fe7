"""Stiff problems for batches, and the same for SciPy."""

import math

import numpy as np
import torch

D = torch.float64
POINTS = 100
WIDTH = 1 / (POINTS + 1)


def robertson(t, x, k):
    """Three species; rates ``k`` of shape (B, 3)."""
    a, b, c = x.unbind(1)
    lost, quick = k[:, 0] * a - k[:, 1] * b * c, k[:, 2] * b * b
    return torch.stack([-lost, lost - quick, quick], 1)


def van_der_pol(t, x, k):
    """Stiffness ``k`` of shape (B, 1)."""
    u, v = x.unbind(1)
    return torch.stack([v, k[:, 0] * (1 - u * u) * v - u], 1)


def reaction_diffusion(t, x, k):
    """Nagumo's equation on a line of 100 points; diffusion and reaction ``k`` of shape (B, 2)."""
    padded = torch.nn.functional.pad(x, (1, 1))
    bend = (padded[:, 2:] - 2 * x + padded[:, :-2]) / WIDTH**2
    return k[:, :1] * bend + k[:, 1:] * x * (1 - x) * (x - 0.25)


def bump():
    return torch.sin(math.pi * WIDTH * torch.arange(1, POINTS + 1, dtype=D))[None]


PROBLEMS = {
    "robertson": (robertson, torch.tensor([[1.0, 0.0, 0.0]], dtype=D), 1e5, [0.04, 1e4, 3e7]),
    "van der pol": (van_der_pol, torch.tensor([[2.0, 0.0]], dtype=D), 1000.0, [1e3]),
    "reaction and diffusion": (reaction_diffusion, bump(), 5.0, [0.01, 5.0]),
}


def for_scipy(field, k):
    """The field of one sample on arrays, and its Jacobian."""
    k = torch.as_tensor(k, dtype=D)[None]

    def velocity(t, y):
        return field(t, torch.from_numpy(np.ascontiguousarray(y))[None], k)[0].numpy()

    def jacobian(t, y):
        x = torch.from_numpy(np.ascontiguousarray(y))
        return torch.autograd.functional.jacobian(lambda x: field(t, x[None], k)[0], x).numpy()

    return velocity, jacobian


def sensitivities(field, k):
    """State and its derivatives in the parameters as one system, ``ds_j/dt = J s_j + df/dk_j``."""
    size = len(k)

    def velocity(t, z):
        y, *s = np.split(z, size + 1)
        x = torch.from_numpy(y.copy())
        weights = torch.as_tensor(k, dtype=D)
        by_x, by_k = torch.autograd.functional.jacobian(lambda x, k: field(t, x[None], k[None])[0], (x, weights))
        with torch.no_grad():
            v = field(t, x[None], weights[None])[0].numpy()
        return np.concatenate([v, *(by_x.numpy() @ s[j] + by_k.numpy()[:, j] for j in range(size))])

    return velocity
