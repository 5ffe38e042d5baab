"""Cases of FrEIA: every module, and what cannot keep the contract. Nets are in freia_nets.py.

Models are built in float32, as users build them, and converted: constants that the library rounds
at construction stay rounded, which is where the floors below come from.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from tests.cases.case import Case, seeded

BATCH, FEATURES = 3, 5
VECTOR, IMAGE, CONDITION = (FEATURES,), (4, 2, 2), 3
Build = Callable[[], tuple[nn.Module, Any]]  # the module, and what it is conditioned on


def subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, outputs))


def conv_subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, outputs, 3, padding=1)
    )


@contextlib.contextmanager
def as_users_build(seed: int = 0) -> Iterator[None]:
    """Seeded, float32, without what the library prints or warns about at construction."""
    with (
        seeded(seed, torch.float32),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def learned_noise(module: nn.Module, scale: float = 0.3) -> None:
    """Normal noise on what is learned; in this library constants are parameters too."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape))


def freia(
    name: str, build: Build, shape: tuple[int, ...] = VECTOR, noise: float = 0.3, **abilities: Any
) -> Case:
    """A case of one module or net; data are standard normal of that shape."""

    def make() -> tuple[Invertible, Tensor]:
        with as_users_build():
            module, context = build()
            learned_noise(module, noise)
            model = wrap(module.double().eval(), context=context)
            x = torch.randn(BATCH, *shape, dtype=torch.float64)
        return model, x

    return Case(f"freia-{name}", make, **abilities)


def built(build: Build) -> tuple[Any, Any]:
    """A module as the cases have it, in float64 with noise on its parameters, and its context."""
    with as_users_build():
        module, context = build()
        learned_noise(module)
    return module.double().eval(), context


def data(*shape: int) -> Tensor:
    """Standard normal, (BATCH, *shape), always the same."""
    return torch.randn(
        BATCH, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )


def plain(module: type[nn.Module], shape: tuple[int, ...] = VECTOR, **arguments: Any) -> Build:
    return lambda: (module([shape], **arguments), None)


def conditional(
    module: Any, shape: tuple[int, ...], conditions: tuple[tuple[int, ...], ...], **arguments: Any
) -> Build:
    def build() -> tuple[nn.Module, list[Tensor]]:
        context = [torch.randn(BATCH, *condition, dtype=torch.float64) for condition in conditions]
        return module([shape], dims_c=list(conditions), **arguments), context

    return build


def couplings() -> Iterator[Case]:
    for block in (
        Fm.NICECouplingBlock,
        Fm.RNVPCouplingBlock,
        Fm.GLOWCouplingBlock,
        Fm.GINCouplingBlock,
        Fm.AffineCouplingOneSided,
        Fm.AllInOneBlock,
    ):
        name, vector, image = (
            block.__name__,
            {"subnet_constructor": subnet},
            {"subnet_constructor": conv_subnet},
        )
        yield freia(name, plain(block, **vector))
        yield freia(f"{name}-image", plain(block, IMAGE, **image), IMAGE)
        yield freia(f"{name}-condition", conditional(block, VECTOR, ((CONDITION,), (2,)), **vector))
        yield freia(
            f"{name}-image-condition", conditional(block, IMAGE, ((1, 2, 2),), **image), IMAGE
        )
    affine = Fm.ConditionalAffineTransform
    yield freia(
        affine.__name__, conditional(affine, VECTOR, ((CONDITION,),), subnet_constructor=subnet)
    )
    two = conditional(affine, IMAGE, ((1, 2, 2), (2, 2, 2)), subnet_constructor=conv_subnet)
    yield freia(f"{affine.__name__}-image-two-conditions", two, IMAGE)
    for clamp in ("TANH", "SIGMOID", torch.sin):
        build = plain(
            Fm.GLOWCouplingBlock,
            subnet_constructor=subnet,
            clamp=1.5,
            clamp_activation=clamp,
            split_len=1,
        )
        yield freia(f"GLOWCouplingBlock-{clamp if isinstance(clamp, str) else 'callable'}", build)


def all_in_one() -> Iterator[Case]:
    variants: dict[str, dict[str, Any]] = {
        "gin": {"gin_block": True},
        "reverse": {"reverse_permutation": True},
        "sigmoid": {"global_affine_type": "SIGMOID"},
        "exp": {"global_affine_type": "EXP", "global_affine_init": 0.7},
        "householder": {"learned_householder_permutation": 3},
        "householder-reverse": {"learned_householder_permutation": 2, "reverse_permutation": True},
    }
    for name, arguments in variants.items():
        yield freia(
            f"AllInOneBlock-{name}", plain(Fm.AllInOneBlock, subnet_constructor=subnet, **arguments)
        )
    for name, arguments in {"soft": {}, "soft-reverse": {"reverse_permutation": True}}.items():
        yield freia(
            f"AllInOneBlock-{name}",
            plain(Fm.AllInOneBlock, subnet_constructor=subnet, permute_soft=True, **arguments),
            float64_floor=5e-7,
            log_det_floor=2e-7,
            floor_reason=ROUNDED_ROTATION,
        )


ROUNDED_ROTATION = (
    "the rotation is rounded to float32 at construction and inverted by its transpose"
)
ROUNDED_INVERSE = "the inverse matrix is computed in float32 at construction"


def elementwise() -> Iterator[Case]:
    for activation in (Fm.InvAutoAct, Fm.InvAutoActTwoSided, Fm.InvAutoActFixed):
        yield freia(activation.__name__, plain(activation))
        yield freia(f"{activation.__name__}-image", plain(activation, IMAGE), IMAGE)
    yield freia("InvertibleSigmoid", plain(Fm.InvertibleSigmoid))
    yield freia("InvertibleSigmoid-image", plain(Fm.InvertibleSigmoid, IMAGE), IMAGE)
    yield freia(
        "LearnedElementwiseScaling",
        plain(Fm.LearnedElementwiseScaling, IMAGE),
        IMAGE,
        skips={
            "test_log_dets_of_the_two_directions_cancel": "its reverse log-det has the sign of "
            "the forward one"
        },
    )
    yield freia("ActNorm", initialised(VECTOR))
    yield freia("ActNorm-image", initialised(IMAGE), IMAGE)


def initialised(shape: tuple[int, ...]) -> Build:
    """ActNorm after its first batch, with which it fills its parameters."""

    def build() -> tuple[nn.Module, None]:
        module = Fm.ActNorm([shape])
        module([3 * torch.randn(20, *shape) + 1])
        return module, None

    return build


def linear() -> Iterator[Case]:
    yield freia("PermuteRandom", plain(Fm.PermuteRandom))
    yield freia("PermuteRandom-image", plain(Fm.PermuteRandom, IMAGE), IMAGE)
    yield freia("HouseholderPerm", plain(Fm.HouseholderPerm, n_reflections=3))
    yield freia(
        "HouseholderPerm-fixed",
        plain(Fm.HouseholderPerm, n_reflections=3, fixed=True),
        float64_floor=3e-6,
        log_det_floor=1e-6,
        floor_reason="the orthogonal matrix is computed in float32 at construction and inverted "
        "by its transpose",
        skips={
            "test_gradients_reach_the_parameters": "its reflections still claim a gradient but "
            "nothing depends on them"
        },
    )
    yield freia(
        "OrthogonalTransform",
        plain(Fm.OrthogonalTransform, correction_interval=10**6),
        noise=0.0,
        float64_floor=2e-6,
        # sum of the errors of so many rows, each of length 1 to float32's rounding
        log_det_floor=VECTOR[0] * torch.finfo(torch.float32).eps,
        floor_reason="the matrix is orthogonal in float32 only and inverted by its transpose",
    )
    yield freia(
        "FixedLinearTransform",
        lambda: (
            Fm.FixedLinearTransform(
                [VECTOR], M=well_conditioned(FEATURES), b=torch.randn(FEATURES)
            ),
            None,
        ),
        float64_floor=1e-6,
        log_det_floor=5e-7,
        floor_reason=ROUNDED_INVERSE,
    )
    yield freia(
        "Fixed1x1Conv",
        lambda: (Fm.Fixed1x1Conv([IMAGE], M=well_conditioned(IMAGE[0])), None),
        IMAGE,
        float64_floor=1e-6,
        log_det_floor=5e-7,
        floor_reason=ROUNDED_INVERSE,
    )


def well_conditioned(size: int) -> Tensor:
    return torch.eye(size) + 0.3 * torch.randn(size, size)


def reshapes() -> Iterator[Case]:
    large = (1, 4, 4)
    for down, up in (
        (Fm.IRevNetDownsampling, Fm.IRevNetUpsampling),
        (Fm.HaarDownsampling, Fm.HaarUpsampling),
    ):
        yield freia(down.__name__, plain(down, large), large)
        yield freia(up.__name__, plain(up, IMAGE), IMAGE)
    for module, shape in ((Fm.IRevNetDownsampling, large), (Fm.IRevNetUpsampling, IMAGE)):
        yield freia(f"{module.__name__}-legacy", plain(module, shape, legacy_backend=True), shape)
    for module, shape in ((Fm.HaarDownsampling, (2, 4, 2)), (Fm.HaarUpsampling, (8, 2, 1))):
        build = plain(module, shape, order_by_wavelet=True, rebalance=0.5)
        yield freia(f"{module.__name__}-rebalanced", build, shape)
    yield freia("Flatten", plain(Fm.Flatten, IMAGE), IMAGE)
    yield freia("Reshape", plain(Fm.Reshape, IMAGE, output_dims=(2, 8)), IMAGE)


def topology() -> Iterator[Case]:
    # by their names in the library: the old ones are all called deprecated_class
    for name in ("Split", "Split1D", "SplitChannel"):
        yield freia(name, plain(getattr(Fm, name), section_sizes=[2, 3]))
    yield freia("Split-image", plain(Fm.Split, IMAGE, n_sections=3, dim=0), IMAGE)
    for name in ("Concat", "Concat1d", "ConcatChannel"):
        yield freia(name, lambda name=name: (getattr(Fm, name)([(2,), (3,)]), None))
    yield freia("Concat-image", lambda: (Fm.Concat([(2, 2, 2), (2, 3, 2)], dim=1), None), (20,))


def others() -> Iterator[Case]:
    wrong_derivative = "the inverse runs without autograd: its derivative is the identity"
    for name, shape in {"": VECTOR, "-image": (1, 4, 4)}.items():
        yield freia(
            f"IResNetLayer{name}",
            lambda shape=shape: (contractive(shape), None),
            shape,
            noise=0.0,
            # one Hutchinson sample: two calls differ; compared in distribution in test_freia.py
            has_log_det=False,
            skips={
                "test_gradients_reach_the_parameters": wrong_derivative,
                "test_gradients_reach_the_input_of_the_inverse": wrong_derivative,
            },
        )


def contractive(shape: tuple[int, ...]) -> nn.Module:
    layer = Fm.IResNetLayer([shape], internal_size=8)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    layer.lipschitz_correction()
    return layer


CASES: list[Case] = [
    *couplings(),
    *all_in_one(),
    *elementwise(),
    *linear(),
    *reshapes(),
    *topology(),
    *others(),
]


class Exempt(NamedTuple):
    """A model that cannot be a case, and the tests of the contract that it fails, with reasons."""

    case: Case
    fails: Mapping[str, str]


def trained_orthogonal() -> tuple[nn.Module, None]:
    module = Fm.OrthogonalTransform([VECTOR], correction_interval=10**6)
    learned_noise(module, 1e-3)
    return module, None


def mixture(components: int = 4) -> tuple[nn.Module, list[Tensor]]:
    shapes = ((components,), (components, FEATURES), (components, FEATURES * (FEATURES + 1) // 2))
    w, mean, factor = (torch.randn(BATCH, *shape, dtype=torch.float64) for shape in shapes)
    chosen = torch.randint(components, (BATCH,))
    return Fm.GaussianMixtureModel([VECTOR], dims_c=list(shapes)), [
        w.softmax(1),
        mean,
        0.3 * factor,
        chosen,
    ]


def sigmoid_of_an_image_in_a_net() -> tuple[nn.Module, None]:
    net = Ff.SequenceINN(4, BATCH, BATCH)
    net.append(Fm.GLOWCouplingBlock, subnet_constructor=conv_subnet)
    net.append(Fm.InvertibleSigmoid)
    return net, None


ROUND_TRIPS = ("test_inverse_of_forward_is_the_identity", "test_forward_of_inverse_is_the_identity")

#: What the library calls an invertible module and what cannot keep the contract; test_freia.py
#: checks that it does not.
EXCEPTIONS: list[Exempt] = [
    Exempt(
        freia("InvAutoFC", plain(Fm.InvAutoFC)),
        dict.fromkeys(
            ROUND_TRIPS,
            "its inverse is the transpose, which is not the inverse before training (perhaps "
            "after)",
        )
        | {"test_log_det_is_that_of_the_autograd_jacobian": "the log-det is the constant 0"},
    ),
    Exempt(
        freia("InvAutoConv2D", plain(Fm.InvAutoConv2D, IMAGE), IMAGE),
        dict.fromkeys(
            ROUND_TRIPS, "its inverse is the transposed convolution, which is not the inverse"
        )
        | {"test_log_det_is_that_of_the_autograd_jacobian": "the log-det is the constant 0"},
    ),
    Exempt(
        freia("OrthogonalTransform-trained", trained_orthogonal, noise=0.0),
        dict.fromkeys(
            ROUND_TRIPS,
            "orthogonal at construction only, and again after every 256 backward passes",
        ),
    ),
    Exempt(
        freia("ActNorm-fresh", plain(Fm.ActNorm)),
        {
            "test_a_call_changes_neither_input_nor_model": "the first call, in any mode and "
            "direction, sets parameters"
        },
    ),
    Exempt(
        freia("InvertibleSigmoid-image-in-a-net", sigmoid_of_an_image_in_a_net, (4, BATCH, BATCH)),
        {
            "test_log_det_is_that_of_the_autograd_jacobian": "its log-det sums over channels "
            "only, (B, H, W); the net "
            "adds that to the (B,) of the others, which broadcasts to a wrong number"
        },
    ),
    Exempt(
        freia("IResNetLayer-log-det", lambda: (contractive(VECTOR), None), noise=0.0),
        {
            "test_log_det_is_that_of_the_autograd_jacobian": "one Hutchinson sample of a "
            "truncated series",
            "test_log_dets_of_the_two_directions_cancel": "the reverse log-det is taken at z "
            "instead of at x",
        },
    ),
    Exempt(
        freia("GaussianMixtureModel", mixture),
        dict.fromkeys(
            ROUND_TRIPS,
            "its factors are made in torch's default dtype: no other than that one works",
        ),
    ),
    Exempt(
        freia("InvertibleModule", plain(Fm.InvertibleModule)),
        dict.fromkeys(ROUND_TRIPS, "the abstract base class: forward raises NotImplementedError"),
    ),
]
