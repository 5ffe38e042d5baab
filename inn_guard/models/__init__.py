"""The models of the papers that this package studies, in their published sizes, built from ``inn_guard.layers``.

Glow and invertible residual networks are bijections; InjFlow, noisy injective flows and autoencoders within flows map
data of D numbers to latents of fewer, and stand beside the baselines of their papers.
"""

from inn_guard.models.aef import LinearAEF, PartitionAEF, center_core, corner_core, random_core
from inn_guard.models.autoencoder import Autoencoder, ManifoldDensity, manifold_density
from inn_guard.models.autoencoder_nets import AutoencoderNets, big_nets, small_nets
from inn_guard.models.core_shell import AutoencoderConfig, CoreShellFlow
from inn_guard.models.glow import (
    CIFAR_CLASSIFIER,
    CIFAR_FLOW,
    FLOW_GAN,
    GlowConfig,
    glow_classifier,
    glow_flow,
    projection_head,
)
from inn_guard.models.importance import ImportanceEstimate, Proposal, importance_log_prob, tuned_width
from inn_guard.models.injective_bounds import EncoderDecoder
from inn_guard.models.injflow import Objective, injflow_linear, injflow_log, spectrally_normalised
from inn_guard.models.injflow_nets import conv_decoder, conv_encoder
from inn_guard.models.iresnet import IResNetConfig, checkerboard_residual_flow, iresnet, power_series, russian_roulette
from inn_guard.models.nif import NIF, GaussianNIF
from inn_guard.models.toy import checkerboard_net, regression_net
from inn_guard.models.vae import VAE, DenoisingAutoencoder
from inn_guard.models.widening import DenseWidening, NearestUpsampling, Widening

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
    "EncoderDecoder",
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
