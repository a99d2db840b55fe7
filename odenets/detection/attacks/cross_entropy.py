"""Cross-entropy for attacks, whose gradient keeps its direction where the network is sure."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CrossEntropy"]


class CrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of logits, with a gradient of the same direction and another length.

    With z the logits, y the label, and ``d = log sum_{j != y} exp(z_j) - z_y`` it is ``CE = log(1 + exp(d))``, whose
    gradient is::

        grad CE = 1 / (1 + exp(-d)) * grad d

    Of this the first factor is left out, as attacks with steps of a given length normalize it away. In single precision
    it is rounded beforehand: from d = -17 on, where the probability of the label is 1, logit y is pushed no more, and
    from d = -104 on the gradient is 0, so that images of which a network is sure stay as they are.

    Args:
        reduction: "none", "mean" or "sum".

    References:
        Carlini, Wagner. Towards evaluating the robustness of neural networks. IEEE S&P 2017, arXiv:1608.04644: the
        gradients of a distilled network vanish so. Athalye, Carlini, Wagner. Obfuscated gradients give a false sense of
        security. ICML 2018, arXiv:1802.00420.

    >>> z, y = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True), torch.tensor([0])
    >>> CrossEntropy()(z, y).backward()
    >>> z.grad, torch.autograd.grad(F.cross_entropy(z, y), z)[0]
    (tensor([[-1.0000,  0.5000,  0.5000]]), tensor([[0., 0., 0.]]))
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``input`` ``(B, classes)`` for labels ``target``, ``(B,)`` or one-hot ``(B, classes)``."""
        y = (target.argmax(1) if target.ndim == 2 else target.long())[:, None]
        d = input.scatter(1, y, -torch.inf).logsumexp(1) - input.gather(1, y)[:, 0]
        if d.requires_grad:
            d.register_hook(torch.ones_like)
        loss = F.softplus(d)
        return loss if self.reduction == "none" else loss.mean() if self.reduction == "mean" else loss.sum()
