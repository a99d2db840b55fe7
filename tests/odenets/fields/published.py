"""Blocks that torchvision has, beside fields with their weights."""

import torch


def take_weights(module, published):
    """Copy parameters and running statistics in the order in which both hold them; statistics of one stage."""
    ours = [*module.parameters(), *(b for name, b in module.named_buffers() if name.endswith(("mean", "var")))]
    theirs = [*published.parameters(), *(b for name, b in published.named_buffers() if name.endswith(("mean", "var")))]
    with torch.no_grad():
        for one, other in zip(ours, theirs, strict=True):
            one.copy_(other.reshape(one.shape))


def randomize(module):
    """Draw parameters and statistics so that no norm is the identity and none is zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / max(1, p[0].numel() if p.ndim else 1) ** 0.5)
        for name, b in module.named_buffers():
            if name.endswith(("mean", "var")):
                b.copy_(torch.rand_like(b) + 0.5)
    return module


def check_step_is_block(step, field, published, x):
    """That ``step(x)`` is the published block: output, gradient of the input, gradients of the parameters."""
    results = []
    for function, module in ((step, field), (published, published)):
        y = x.clone().requires_grad_()
        out = function(y)
        target = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        gradients = torch.autograd.grad((out * target).sum(), [y, *module.parameters()])
        results.append([out.detach(), gradients[0], *(g.flatten() for g in gradients[1:])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
