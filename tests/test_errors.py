import copy
import pickle

import pytest

from onnxcar import errors

ERRORS = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
PUBLIC = [cls for cls in ERRORS if issubclass(cls, errors.OnnxcarError)]


@pytest.mark.parametrize("cls", PUBLIC)
def test_facts_are_attributes_and_the_message_is_the_text(cls: type[errors.OnnxcarError]) -> None:
    exc = cls("Layer 'conv1' keeps 0. Keep one.", node="conv1", kept=0, filename="m.onnx")
    assert str(exc) == "Layer 'conv1' keeps 0. Keep one."
    assert (exc.node, exc.kept, exc.filename) == ("conv1", 0, "m.onnx")
    assert exc.facts == {"node": "conv1", "kept": 0, "filename": "m.onnx"}


@pytest.mark.parametrize("cls", PUBLIC)
def test_errors_survive_the_way_back_from_another_process(cls: type[errors.OnnxcarError]) -> None:
    exc = cls("Bad label 12.", sample=3)
    for twin in (pickle.loads(pickle.dumps(exc)), copy.copy(exc)):
        assert type(twin) is cls
        assert str(twin) == str(exc)
        assert twin.sample == 3
        assert twin.facts == {"sample": 3}


def test_a_bug_of_ours_is_no_user_error() -> None:
    assert not issubclass(errors.InternalError, errors.OnnxcarError)


@pytest.mark.parametrize("cls", PUBLIC)
def test_every_error_refines_a_builtin(cls: type[errors.OnnxcarError]) -> None:
    if cls is not errors.OnnxcarError:
        assert issubclass(cls, ValueError | RuntimeError | OSError)


def test_the_tree_in_the_docstring_names_every_class() -> None:
    drawn = (errors.__doc__ or "").split()
    missing = [name for name in errors.__all__ if name not in drawn]
    assert missing == []


def test_unknown_public_name_is_an_attribute_error() -> None:
    import onnxcar

    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        _ = onnxcar.prnue
    assert onnxcar.ModelError is errors.ModelError
