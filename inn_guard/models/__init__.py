"""The models of the papers, in their published sizes, built from ``inn_guard.layers``.

Glow and invertible residual networks are bijections; InjFlow, noisy injective flows and
autoencoders within flows map data of D numbers to latents of fewer. The baselines of their papers
are here too.
"""

from inn_guard.models.aef.flow import AutoencoderConfig, CoreShellFlow
from inn_guard.models.aef.importance_sampling import (
    ImportanceEstimate,
    Proposal,
    importance_log_prob,
    tuned_width,
)
from inn_guard.models.aef.model import (
    LinearAEF,
    PartitionAEF,
    center_core,
    corner_core,
    random_core,
)
from inn_guard.models.aef.networks import AutoencoderNets, big_nets, small_nets
from inn_guard.models.aef.vae import VAE, DenoisingAutoencoder
from inn_guard.models.autoencoder import Autoencoder, ManifoldDensity, manifold_density
from inn_guard.models.glow import (
    CIFAR_CLASSIFIER,
    CIFAR_FLOW,
    FLOW_GAN,
    GlowConfig,
    glow_classifier,
    glow_flow,
    projection_head,
)
from inn_guard.models.injflow.networks import conv_decoder, conv_encoder
from inn_guard.models.injflow.objectives import (
    Objective,
    injflow_linear,
    injflow_log,
    spectrally_normalised,
)
from inn_guard.models.iresnet import (
    IResNetConfig,
    checkerboard_residual_flow,
    iresnet,
    power_series,
    russian_roulette,
)
from inn_guard.models.nif.model import NIF, GaussianNIF
from inn_guard.models.nif.widening import DenseWidening, NearestUpsampling, Widening
from inn_guard.models.toy import checkerboard_net, regression_net

__all__ = [
    "CIFAR_CLASSIFIER",
    "CIFAR_FLOW",
    "FLOW_GAN",
    "NIF",
    "VAE",
    "Autoencoder",
    "AutoencoderConfig",
    "AutoencoderNets",
    "CoreShellFlow",
    "DenoisingAutoencoder",
    "DenseWidening",
    "GaussianNIF",
    "GlowConfig",
    "IResNetConfig",
    "ImportanceEstimate",
    "LinearAEF",
    "ManifoldDensity",
    "NearestUpsampling",
    "Objective",
    "PartitionAEF",
    "Proposal",
    "Widening",
    "big_nets",
    "center_core",
    "checkerboard_net",
    "checkerboard_residual_flow",
    "conv_decoder",
    "conv_encoder",
    "corner_core",
    "glow_classifier",
    "glow_flow",
    "importance_log_prob",
    "injflow_linear",
    "injflow_log",
    "iresnet",
    "manifold_density",
    "power_series",
    "projection_head",
    "random_core",
    "regression_net",
    "russian_roulette",
    "small_nets",
    "spectrally_normalised",
    "tuned_width",
]
