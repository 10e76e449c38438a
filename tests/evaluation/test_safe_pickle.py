import collections
import pickle

import pytest

from prism_deco.evaluation.annotations import load_data_pickle

DATA = [{"ref_id": 1, "sentences": [{"sent": "the left cat", "tokens": ("the", "left")}], "box": [1.5, None, True]}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(DATA, protocol=protocol))
    assert load_data_pickle(path) == DATA


def test_python_2_strings(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"(dp0\nS'sent'\np1\nS'caf\\xc3\\xa9'\np2\ns.")  # pickle.dumps({'sent': 'café'}) of Python 2
    assert load_data_pickle(path) == {"sent": "café"}


class Runs:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize("value", [Runs(), print, collections.OrderedDict(a=1), Runs, [{"deep": [Runs()]}]])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_classes_and_functions_are_refused(tmp_path, value, protocol):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(ValueError, match=r"refs\.p is not a pickle of plain data .*it asks for"):
        load_data_pickle(path)


def test_a_hand_written_system_call_is_refused(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode())
    with pytest.raises(ValueError, match=r"os\.system|posix\.system"):
        load_data_pickle(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(DATA)[:-10], b"\x80\x05", b"\xff" * 50])
def test_damaged_pickles(tmp_path, content):
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\.p"):
        load_data_pickle(path)


def test_missing_pickle(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_data_pickle(tmp_path / "refs.p")
