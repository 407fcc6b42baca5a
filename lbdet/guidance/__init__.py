"""What else pulls on a student: extra losses from a float model, by name.

    name     the teacher                    pulls on the student  pulls on the teacher
    teacher  frozen, in eval mode           hints                 -
    joint    learns, by its own optimizer   hints                 the task, hints

A hint is a difference of outputs: of class scores (`logits`), of boxes, of feature maps at `taps`. A frozen
teacher costs a forward pass more a batch, one that learns a forward and a backward pass.
"""

from __future__ import annotations

from lbdet.guidance.base import Guidance, TaskLosses
from lbdet.guidance.joint import Joint
from lbdet.guidance.teacher import FrozenTeacher

GUIDANCE: dict[str, type[Guidance]] = {"teacher": FrozenTeacher, "joint": Joint}

__all__ = ["GUIDANCE", "FrozenTeacher", "Guidance", "Joint", "TaskLosses"]
