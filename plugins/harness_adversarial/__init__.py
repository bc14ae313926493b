"""Adversarial pictures: small changes that change the answer, and how a model bears them."""

from __future__ import annotations

from harness import Technique, hookimpl

from .adversarial_training import AdversarialTraining
from .attack_curve import AttackCurve
from .certified_radius import CertifiedRadius
from .confidence import Confidence
from .decision_slice import DecisionSlice
from .fooling_image import FoolingImage
from .minimal_perturbation import MinimalPerturbation
from .transfer_matrix import TransferMatrix
from .universal_perturbation import UniversalPerturbation

__all__ = [
    "AdversarialTraining",
    "AttackCurve",
    "CertifiedRadius",
    "Confidence",
    "DecisionSlice",
    "FoolingImage",
    "MinimalPerturbation",
    "TransferMatrix",
    "UniversalPerturbation",
]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [
        AdversarialTraining,
        AttackCurve,
        CertifiedRadius,
        Confidence,
        DecisionSlice,
        FoolingImage,
        MinimalPerturbation,
        TransferMatrix,
        UniversalPerturbation,
    ]
