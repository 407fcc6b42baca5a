"""8-bit inputs for a run that was trained without activation bits."""

from __future__ import annotations

import pytest
from deploy.detectors import labelled, tiny_classifier
from deploy.toys import quantized

from lbdet.convert import quantize_model, quantized_layers
from lbdet.deploy.export import quantize_inputs
from lbdet.engine.task import ClassificationTask
from lbdet.errors import UserError


def test_calibrated_inputs_are_for_layers_of_weight_bits_alone():
    model = tiny_classifier()
    quantize_model(model, "W4", keep_float=("fc",))
    quantize_inputs(model, ClassificationTask(), labelled(), 4)
    layers = quantized_layers(model).values()
    assert {str(layer.precision) for layer in layers} == {"W4A8"}
    assert all(layer.activation_quantizer.range(8) is not None for layer in layers)


@pytest.mark.parametrize("precision", ["W4A8", "float"])
def test_where_there_is_nothing_to_calibrate_it_is_refused(precision):
    with pytest.raises(UserError, match=r"^--calibration-images: is for runs of weight bits without"):
        quantize_inputs(quantized(precision), ClassificationTask(), labelled(), 4)
