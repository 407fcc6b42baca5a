"""A frozen float model shows the student what to say.

Reference:
    Hinton, Vinyals, Dean 2015, arXiv 1503.02531; Zhuang et al. 2018, arXiv 1711.00205 and 2022, arXiv
    1908.04680, guide a low-precision network by a full-precision one (see `lbdet.guidance.joint`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbdet.guidance.base import Guidance, TaskLosses


class FrozenTeacher(Guidance):
    """Hints from a teacher that never changes: it is in eval mode and has no gradient.

    Args, Raises: as in `Guidance`.
    """

    @property
    def trained(self) -> list[nn.Module]:
        return []

    def losses(self, task_losses: TaskLosses) -> dict[str, Tensor]:
        """Return the hints as "hint_logits", "hint_boxes", "hint_features"; `task_losses` is not asked."""
        with torch.no_grad():
            shown = self._recorder.ask(self.teacher)
        return self._hints_to_student(self._recorder.said(), shown)

    def _begin(self, student: nn.Module) -> None:
        self.teacher.eval().requires_grad_(False)
