"""Adversarial pictures: small changes that change the answer, and how a model bears them."""

from __future__ import annotations

from harness import Technique, hookimpl

from .attack_curve import AttackCurve
from .fooling_image import FoolingImage

__all__ = ["AttackCurve", "FoolingImage"]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [AttackCurve, FoolingImage]
