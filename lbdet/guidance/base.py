"""What every guidance is told, and what the training loop asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lbdet.guidance.heads import Scores, recorder_for
from lbdet.guidance.hints import Divisor, boxes_loss, logits_loss
from lbdet.guidance.taps import Taps, features_loss, rounded

TaskLosses = Callable[[nn.Module], dict[str, Tensor]]
"""Computes the task's own losses `[]`, by name, of any model on the present batch."""


class Guidance(ABC):
    """Extra losses in a student's training, from a teacher of the same architecture and classes.

    Args:
        student: watched from now on, until `close`.
        teacher: a float model; what becomes of it is the subclass' matter.
        logits: weight of the hint on class scores, see `lbdet.guidance.hints`.
        boxes: weight of the hint on boxes, likewise; nothing for a classifier.
        temperature: T of the class scores' softmax.
        features: weight of the hint on feature maps, see `lbdet.guidance.taps`.
        taps: names of the modules, in both models, that put these maps out.
        tap_bits: 2 to 8, the width that the teacher's maps are rounded to first; None = they stay float.
        divisor: how the number of objects, or the power of maps, divides; see `lbdet.guidance.hints`.

    Raises:
        UserError: a tap that is no module.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        logits: float = 0.0,
        boxes: float = 0.0,
        temperature: float = 1.0,
        features: float = 0.0,
        taps: Sequence[str] = (),
        tap_bits: int | None = None,
        divisor: Divisor = torch.clamp_min,
    ) -> None:
        self.teacher = teacher
        self.logits, self.boxes, self.temperature = logits, boxes, temperature
        self.features, self.tap_bits = features, tap_bits
        self._divisor = divisor
        self._taps = Taps(student, teacher, taps)
        self._recorder = recorder_for(student)
        self._begin(student)

    @property
    @abstractmethod
    def trained(self) -> list[nn.Module]:
        """The models besides the student that the loop has to train, each by its own losses."""

    @abstractmethod
    def losses(self, task_losses: TaskLosses) -> dict[str, Tensor]:
        """Return the weighted losses `[]` of the student's last forward pass, by name.

        Raises:
            UserError: a tap that has no maps, or not the same in both models.
            NumericsError: a map to be rounded has values that are not finite.
        """

    def close(self) -> None:
        """Stop watching; all hooks are gone."""
        self._recorder.close()
        self._taps.close()

    @abstractmethod
    def _begin(self, student: nn.Module) -> None:
        """Make the teacher ready."""

    def _hints_to_student(self, said: list[Scores], shown: list[Scores]) -> dict[str, Tensor]:
        pairs = [(s, rounded(t, self.tap_bits)) for s, t in self._taps.pairs()] if self.features else []
        return self._hints(said, shown, pairs)

    def _hints_to_teacher(self, said: list[Scores], shown: list[Scores]) -> dict[str, Tensor]:
        pairs = [(t, s.detach()) for s, t in self._taps.pairs()] if self.features else []
        return self._hints(said, shown, pairs)

    def _hints(
        self, said: list[Scores], shown: list[Scores], maps: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the losses that pull the one who `said` to what was `shown`, which gets no gradient."""
        heads = [(s, t.detach()) for s, t in zip(said, shown, strict=True)]
        losses: dict[str, list[Tensor]] = {"hint_logits": [], "hint_boxes": [], "hint_features": []}
        if self.logits:
            losses["hint_logits"] = [
                self.logits * logits_loss(s, t, self.temperature, self._divisor) for s, t in heads
            ]
        if self.boxes:
            losses["hint_boxes"] = [
                self.boxes * boxes_loss(s, t, self._divisor) for s, t in heads if t.boxes is not None
            ]
        if maps:
            losses["hint_features"] = [
                self.features / len(maps) * features_loss(s, t, self._divisor) for s, t in maps
            ]
        return {name: torch.stack(parts).sum() for name, parts in losses.items() if parts}
