"""Log-odds, which attacks climb in place of the cross-entropy: in its direction also where a network is sure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LogOdds"]


class LogOdds(nn.CrossEntropyLoss):
    """Log-odds of the other classes against the label.

    With z the logits and y the label they are ``d = log sum_{j != y} exp(z_j) - z_y``. The cross-entropy
    ``log(1 + exp(d))`` grows with d, and its gradient::

        grad CE = 1 / (1 + exp(-d)) * grad d

    has the same direction; the factor is what attacks with steps of a given length normalize away. In single precision
    it is rounded beforehand: from d = -17 on, where the probability of the label is 1, logit y is pushed no more, and
    from d = -104 on loss and gradient are 0, so that images of which a network is sure stay as they are.

    It is a kind of ``CrossEntropyLoss`` as ART decides by that which labels it takes.

    Args:
        reduction: "none", "mean" or "sum".

    References:
        Carlini, Wagner. Towards evaluating the robustness of neural networks. IEEE S&P 2017, arXiv:1608.04644: the
        gradients of a distilled network vanish so. Athalye, Carlini, Wagner. Obfuscated gradients give a false sense of
        security. ICML 2018, arXiv:1802.00420.

    >>> z, y = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True), torch.tensor([0])
    >>> torch.autograd.grad(LogOdds()(z, y), z)[0], torch.autograd.grad(nn.CrossEntropyLoss()(z, y), z)[0]
    (tensor([[-1.0000,  0.5000,  0.5000]]), tensor([[0., 0., 0.]]))
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Of logits ``input`` ``(B, classes)`` and labels ``target`` ``(B,)``: ``(B,)``, or their mean or sum."""
        y = target.long()[:, None]
        d = input.scatter(1, y, -torch.inf).logsumexp(1) - input.gather(1, y)[:, 0]
        return d if self.reduction == "none" else d.mean() if self.reduction == "mean" else d.sum()
