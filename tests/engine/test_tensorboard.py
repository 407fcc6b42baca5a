"""Scalars for TensorBoard, where it is installed."""

from __future__ import annotations

import builtins

import pytest

from lbdet.engine.tensorboard import scalars


def test_the_numbers_of_a_record_can_be_read_back(tmp_path):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with scalars(tmp_path, 0) as show:
        show({"step": 20, "loss": 1.5, "name": "left out"})
    events = event_file.EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(20, 1.5)]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with scalars(None, 0) as show:
        show({"step": 20, "loss": 1.5})
    assert not list(tmp_path.iterdir())


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with scalars(tmp_path, 0) as show:
        show({"step": 20, "loss": 1.5})
    assert not list(tmp_path.iterdir())
