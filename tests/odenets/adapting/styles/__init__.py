"""Networks in styles of many authors, for which steps are computed by hand: ``STYLES`` by name."""

from functools import partial

import torch

from tests.odenets.adapting.styles import images as i
from tests.odenets.adapting.styles import shortcuts as c
from tests.odenets.adapting.styles import structures as s
from tests.odenets.adapting.styles import transformers as t
from tests.odenets.adapting.styles import unusual as u
from tests.odenets.adapting.styles import whole as w
from tests.odenets.adapting.styles.skeleton import Style, images, of_images, of_tokens, tokens

__all__ = ["STYLES", "Style"]


def conditions(batch, size):
    return (*tokens(batch, size), torch.randn(batch, 4))


def three(batch, size):
    return (*images(batch, size), torch.randn(batch, 4), torch.rand(batch))


def pair(batch, size):
    return (*images(batch, size), *images(batch, size))


def sequences(batch, size):
    return (*tokens(batch, size), *tokens(batch, size + 2))


def identifiers(batch, size):
    return (torch.randint(0, 11, (batch, size)),)


def padded(batch, size):
    return (*tokens(batch, size), torch.arange(size) < torch.arange(batch)[:, None] + 3)


def video(batch, size):
    return (torch.randn(batch, 3, 3, size, size),)


STYLES = {
    # ways to add
    "torch.add(branch, x)": Style(of_images(i.BranchFirst, i.BranchFirst)),
    "x += branch": Style(of_images(i.InPlaceOnTheState, i.InPlaceOnTheState)),
    "branch += x": Style(of_images(i.InPlaceOnTheBranch, i.InPlaceOnTheBranch)),
    "x.add_(branch)": Style(of_images(i.Method, i.Method)),
    "sum([x, branch])": Style(of_images(i.OfASum, i.OfASum)),
    "torch.stack([x, branch]).sum(0)": Style(of_images(i.OfAStack, i.OfAStack)),
    "FloatFunctional": Style(of_images(i.AnAdditionThatIsAModule, i.AnAdditionThatIsAModule)),
    "Residual(fn), parametrized": Style(of_images(i.Wrapped, i.Wrapped)),
    "x.clone()": Style(of_images(i.OfACopy, i.OfACopy)),
    "x + conv(x)": Style(of_images(i.LinearBranch, i.InPlaceOnTheBranch)),
    "x - branch": Style(of_images(i.Minus, i.Minus)),
    # scaled branches
    "torch.add(x, branch, alpha=0.1)": Style(of_images(i.Alpha, i.Alpha)),
    "x + 0.1 * branch": Style(of_images(i.Scaled, i.Scaled)),
    "(x + branch) / sqrt(2)": Style(of_images(i.Halved, i.Halved)),
    "ReZero": Style(of_images(i.ReZero, i.ReZero)),
    "layer scale by addcmul": Style(of_images(i.LayerScale, i.LayerScale)),
    "gate of the state": Style(of_images(i.Gated, i.Gated)),
    "stochastic depth by a mask": Style(of_images(i.Dropped, i.Dropped)),
    "stochastic depth by if": Style(of_images(i.Skipped, i.Minus, i.Skipped)),
    "shake-shake": Style(of_images(i.Shaken, i.Shaken)),
    # activations
    "F.relu(x + branch)": Style(of_images(i.ReluOfTheSum, i.ReluOfTheSum)),
    "PReLU(x + branch)": Style(of_images(i.PReluOfTheSum, i.PReluOfTheSum)),
    "swish by hand of the sum": Style(of_images(i.TheSumIsReadTwice, i.TheSumIsReadTwice)),
    "norm of the sum": Style(of_images(i.NormOfTheSum, i.NormOfTheSum)),
    "first ReLU in place": Style(of_images(i.InputChangedInPlace, i.InputChangedInPlace)),
    # shortcuts
    "shortcut module only where the shape changes": Style(
        of_images(
            *(partial(c.PreActivation, *a) for a in [(8, 8), (8, 8), (8, 16, 2), (16, 16)]),
            width=16,
        )
    ),
    "option A": Style(of_images(i.ReluOfTheSum, c.OptionA, width=16)),
    "PyramidNet": Style(of_images(c.Pyramid, width=16)),
    "ResNet-D": Style(of_images(partial(c.ResNetD, 8, 8), partial(c.ResNetD, 8, 16, 2), width=16)),
    "blocks of a GAN": Style(of_images(c.Generator, c.Discriminator)),
    "max-pooled shortcut": Style(of_images(c.PooledSkip)),
    "doubled channels": Style(of_images(c.DoubledChannels, width=16)),
    "channels last": Style(of_images(c.ChannelsLast, c.ChannelsLast)),
    # structures
    "nested": Style(of_images(s.Nested, s.Plain)),
    "Res2Net": Style(of_images(s.Hierarchical, s.Hierarchical)),
    "reversible": Style(of_images(s.Reversible, s.Reversible)),
    "concatenation beside addition": Style(of_images(s.Dense, s.Dense)),
    "RepVGG beside additions": Style(of_images(s.Reparameterized, s.Plain, s.Reparameterized)),
    "sums of two branches": Style(of_images(s.SumOfBranches, s.Plain)),
    "Fourier layers": Style(of_images(s.Spectral, s.Spectral)),
    "a Function of one's own": Style(of_images(s.CustomFunction, s.CustomFunction)),
    "containers": Style(s.Containers),
    "shared": Style(s.Shared),
    "checkpoint": Style(s.Checkpointed),
    "scripted and traced": Style(s.Scripted),
    # additions outside of blocks
    "top level": Style(w.TopLevel),
    "raw parameters": Style(w.RawParameters, tokens, sizes=False),
    "functions by hand": Style(w.FunctionsOnly, tokens),
    "a skip over all blocks": Style(w.GlobalSkip),
    "three inputs": Style(w.ThreeInputs, three),
    "twins": Style(w.Twins, pair),
    "U-Net": Style(w.Unet),
    "frames in the batch": Style(w.Frames, video),
    "list of layers": Style(w.FlatList, tokens),
    # no module's border
    "forward called directly": Style(u.Direct),
    "layers in a list of Python's": Style(u.Unregistered, tokens),
    "an addition in a hook": Style(u.Hooked, tokens),
    "functional_call": Style(u.Functional, tokens),
    "a dictionary that blocks change": Style(u.Features),
    "activations by hand": Style(u.ActivationsByHand),
    "masks": Style(u.Masked, padded),
    "layers dropped at random": Style(u.LayerDrop, steady=False),
    "loops": Style(u.Loops, tokens),
    "a sum of states": Style(u.SumOfStates),
    "an adding U-Net": Style(u.AddingUnet),
    "squeeze and excitation": Style(u.Squeezed),
    # tokens
    "transformer": Style(of_tokens(t.PreNorm, t.PreNorm), tokens),
    "parallel branches": Style(of_tokens(t.Parallel, t.ParallelBranchesFirst, t.ParallelInPlace), tokens),
    "post-norm": Style(of_tokens(t.PostNorm, t.PostNorm), tokens),
    "DiT": Style(of_tokens(t.Conditioned, t.Conditioned), conditions),
    "LoRA and adapters": Style(of_tokens(t.LowRank, t.LowRank), tokens),
    "experts": Style(of_tokens(t.Experts, t.Experts), tokens),
    "delayed additions": Style(t.DelayedAdditions, tokens),
    "(T, B, D)": Style(t.SequenceFirst, batch_dim=1),
    "language model": Style(t.LanguageModel, identifiers),
    "latents": Style(t.Latents, tokens),
    "encoder and decoder": Style(t.EncoderDecoder, sequences),
    # precision
    "float64": Style(of_images(partial(c.ResNetD, 8, 8), i.Gated), dtype=torch.float64),
    "bfloat16": Style(of_tokens(t.PreNorm, t.Parallel), tokens, dtype=torch.bfloat16),
    "float16": Style(of_tokens(t.PreNorm, t.ParallelBranchesFirst), tokens, dtype=torch.float16),
    "a wider state": Style(t.WideResidual, tokens, dtype=torch.bfloat16),
}
