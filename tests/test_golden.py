"""Golden numbers: what the authors' released code computed, computed by ours."""

import sys
from pathlib import Path

import golden
import pytest
from golden import LIMIT, Recording
from safetensors import safe_open
from safetensors.torch import save_file

FILES = sorted((Path(__file__).parent / "data").glob("golden_*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_record_of_the_authors_code_is_reproduced_and_training_moved_the_logits(path):
    errors = dict(Recording(path).errors())
    assert len(errors) == 13
    assert max(errors.values()) <= LIMIT, errors
    tensors = Recording(FILES[0]).tensors
    before, after = tensors["official_logits"], tensors["sdt.trained_official_logits"]
    assert float((before - after).norm() / before.norm()) > 50 * LIMIT


def test_the_command_prints_each_record_and_fails_on_a_wrong_one(tmp_path, monkeypatch, capsys):
    def run(path):
        monkeypatch.setattr(sys, "argv", ["golden.py", str(path)])
        return golden.main()

    assert (run(FILES[0]), len(capsys.readouterr().out.splitlines())) == (0, 13)
    with safe_open(FILES[0], framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["lambda.telescoping_mean"] *= 1.001
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    assert run(tmp_path / "wrong.safetensors") == 1
