"""Student and float teacher learn together: each from the task, and each from what the other one says.

    L(student) = task losses(student) + hints(student <- teacher)
    L(teacher) = task losses(teacher) + hints(teacher <- student)

on the same pixels, `<-` being a difference of which the right side counts as a constant. So one backward pass
of the sum gives each model the gradients of its own losses and nothing of the other's, and each has its own
optimizer.

A Faster R-CNN's box head is compared on the proposals that the student sampled; for its own losses the
teacher samples some of its own.

Reference:
    Zhuang, Shen, Tan, Liu, Reid 2018, "Towards effective low-bitwidth convolutional neural networks", section
    on guided training, arXiv 1711.00205; 2022, "Effective training of convolutional neural networks with
    low-bitwidth weights and activations", arXiv 1908.04680.

Differs from the paper:
    It compares feature maps, this also the heads' outputs. That the teacher learns from the student's map
    with its own as it is, not quantized, is our reading.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lbdet.guidance.base import Guidance, TaskLosses
from lbdet.guidance.batch import SameBatch
from lbdet.guidance.heads import recorder_for


class Joint(Guidance):
    """Hints from a teacher that is trained as well, with the same hints from the student.

    The float parameters of the teacher learn where the student's of the same name do, as it is made. The loop
    keeps the teacher in the student's training mode and gives it an optimizer.

    Args, Raises: as in `Guidance`.
    """

    @property
    def trained(self) -> list[nn.Module]:
        return [self.teacher]

    def losses(self, task_losses: TaskLosses) -> dict[str, Tensor]:
        """Return the hints to the student, named as a frozen teacher's, and the teacher's own losses.

        Those are "teacher_<name>" for each loss of the task and "teacher_hint_logits" and so on. The teacher
        runs once, with random numbers of its own: the student's next ones are what they would be without it.
        """
        assert self.teacher.training
        said = self._recorder.said()
        with _random_numbers_kept(self.teacher):
            with self._batch.given_to(self.teacher):
                own = task_losses(self.teacher)
            answer = self._answers.said_of(self._recorder)
        hints, back = self._hints_to_student(said, answer), self._hints_to_teacher(answer, said)
        return hints | {f"teacher_{name}": loss for name, loss in (own | back).items()}

    def close(self) -> None:
        super().close()
        self._answers.close()
        self._batch.close()

    def _begin(self, student: nn.Module) -> None:
        self._answers, self._batch = recorder_for(self.teacher), SameBatch(student)
        learns = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
        for name, parameter in self.teacher.train().named_parameters():
            if "_quantizer." not in name:  # those of quantizers have no part in a float model
                parameter.requires_grad_(learns[name])


def _random_numbers_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Restore, at the end, the state of the generators that a forward pass of `model` draws from."""
    device = next(model.parameters()).device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
