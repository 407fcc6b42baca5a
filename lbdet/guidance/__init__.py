"""Extra losses from a float model, by name."""

from __future__ import annotations

from lbdet.guidance.teacher import FrozenTeacher

Guidance = FrozenTeacher
GUIDANCE: dict[str, type[Guidance]] = {"teacher": FrozenTeacher}

__all__ = ["GUIDANCE", "FrozenTeacher", "Guidance"]
