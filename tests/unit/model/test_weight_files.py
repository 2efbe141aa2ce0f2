"""Checkpoints as trainers write them: where the weights are found, what is refused, and that no code is run."""

import argparse
import collections
import copy
import datetime
import decimal
import enum
import functools
import gzip
import io
import os
import pathlib
import pickle
import re
import subprocess
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel

import posmlp
from posmlp.model.checkpoint import CheckpointError, fit_published
from posmlp.model.weight_files import read_weight_file


def tiny(**overrides):
    return posmlp.create_model("tiny", **({"num_classes": 5, "frames": 4, "image_size": 32} | overrides))


torch.manual_seed(0)
MODEL = tiny()
STATE = MODEL.state_dict()
OTHER = {k: v + 1 for k, v in STATE.items()}  # other weights of the same model
NO_HEAD = {k: v for k, v in STATE.items() if not k.startswith("head.")}
MOMENTS = {k: torch.rand_like(v) for k, v in MODEL.named_parameters()}  # with the names of the weights


def prefixed(prefix, state=STATE):
    return {prefix + k: v for k, v in state.items()}


def optimizer_state():
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def loads(content, path):
    """Save and load, and check that the model has the tensors of ``STATE``. Returns what was adapted."""
    torch.save(content, path)
    model = tiny()
    report = posmlp.load_published(model, path)
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, STATE[name]), name
    assert report.loaded == sum(not k.endswith("num_batches_tracked") for k in STATE)
    return tuple(filter(None, (report.choice, *report.adapted)))


class OwnDict(dict):
    """A dict such as trainers define."""


# --- where the weights are ---------------------------------------------------------------------------------------

WRAPPED = {
    "the release's trainer": lambda: {
        "epoch": 3,
        "model_state": STATE,
        "optimizer_state": optimizer_state(),
        "cfg": "A",
    },
    "model_state_dict": lambda: {"model_state_dict": STATE},
    "an unknown key": lambda: {"Whatever": {"It Is": STATE}},
    "lightning": lambda: {
        "state_dict": prefixed("model.") | {"criterion.weight": torch.ones(5)},
        "optimizer_states": [optimizer_state()],
        "hyper_parameters": argparse.Namespace(lr=1e-3),
    },
    "compiled": lambda: prefixed("_orig_mod."),
    "compiled inside": lambda: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in STATE.items()},
    "compiled in DDP": lambda: prefixed("module._orig_mod."),
    "FSDP": lambda: {
        "_fsdp_wrapped_module." + k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v
        for k, v in STATE.items()
    },
    "DDP twice": lambda: prefixed("module.module."),
    "torch's average": lambda: AveragedModel(MODEL).state_dict(),
    "a backbone with its head outside": lambda: {
        "state_dict": prefixed("backbone.", NO_HEAD) | {k: v for k, v in STATE.items() if k.startswith("head.")}
    },
    "a list": lambda: [3, {"models": [STATE]}],
    "a tuple": lambda: (STATE, 3),
    "a dict of its own class": lambda: {"model": OwnDict(STATE)},
    "defaultdict": lambda: {"model": collections.defaultdict(list, STATE)},
    "dicts of modules": lambda: {
        "net": {"stem": {k[5:]: v for k, v in STATE.items() if k.startswith("stem.")}}
        | {k: v for k, v in STATE.items() if not k.startswith("stem.")}
    },
    "bytes as keys": lambda: {b"model": STATE},
    "parameters": lambda: {"model": MODEL.state_dict(keep_vars=True)},
    "doubles": lambda: {"model": {k: v.double() for k, v in STATE.items()}},
    "no counters": lambda: {k: v for k, v in STATE.items() if not k.endswith("num_batches_tracked")},
    "a whole module": lambda: MODEL,
    "a whole module in DataParallel": lambda: {"model": torch.nn.DataParallel(MODEL)},
    "moments first": lambda: {"optimizer": {"exp_avg": MOMENTS, "exp_avg_sq": MOMENTS}, "net": STATE},
    "moments by weight": lambda: {"s": {k: {"exp_avg": v, "step": v.sum()} for k, v in MOMENTS.items()}, "net": STATE},
    "moments under another key": lambda: {"adam": MOMENTS, "net": STATE},
    "a larger model first": lambda: {"teacher": tiny(depths=(2, 2, 2, 1)).state_dict(), "student": STATE},
    "unusable tensors elsewhere": lambda: {"model": STATE, "graph": torch.eye(3).to_sparse()},
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_wherever_they_are(make, tmp_path):
    assert loads(make(), tmp_path / "weights.pth") == ()


AVERAGED = {
    "timm": ({"state_dict": OTHER, "state_dict_ema": STATE}, "state_dict_ema", "state_dict"),
    "model_ema": ({"model": OTHER, "model_ema": STATE}, "model_ema", "model"),
    "ema first": ({"ema": prefixed("module."), "model": OTHER}, "ema.module", "model"),
    "teacher": ({"student": prefixed("module.", OTHER), "teacher": STATE}, "teacher", "student.module"),
    "one mapping": (prefixed("online_model.", OTHER) | prefixed("ema_model."), "ema_model", "online_model"),
    "modules": ({"model": copy.deepcopy(MODEL).requires_grad_(False), "ema": MODEL}, "ema", "model"),
    "MMEngine, whose hook swaps them": (
        {"state_dict": STATE, "ema_state_dict": prefixed("module.", OTHER) | {"steps": torch.tensor(1)}},
        "state_dict",
        "ema_state_dict.module",
    ),
    "neither is an average": ({"last": STATE, "best": OTHER}, "last", "best"),
}


@pytest.mark.parametrize(("content", "taken", "left"), AVERAGED.values(), ids=AVERAGED)
def test_an_average_is_preferred_and_the_report_says_so(content, taken, left, tmp_path):
    assert loads(content, tmp_path / "a.pth") == (f"weights: {taken}; the checkpoint also has {left}",)


def test_an_average_without_batch_norm_statistics_is_not_taken(tmp_path):
    """Many EMA classes keep parameters only."""
    assert loads({"ema": MOMENTS, "model": STATE}, tmp_path / "a.pth") == ()


@pytest.mark.parametrize("other", [{}, {"head.projection.weight": torch.ones(9, 64)}, {"fc.weight": torch.ones(9, 64)}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_missing_head_stays_fresh(prefix, other):
    model = tiny()
    head = model.head.weight.clone(), model.head.bias.clone()
    report = posmlp.load_published(model, prefixed(prefix, NO_HEAD | other))
    assert report.adapted == ("head: fresh, as the checkpoint has none",)
    assert torch.equal(model.head.weight, head[0]) and torch.equal(model.head.bias, head[1])
    assert torch.equal(model.norm.weight, STATE["norm.weight"])
    with pytest.raises(CheckpointError, match=r"\(1 problem\).*\n  missing: head.bias \[5\]"):
        posmlp.load_published(model, {k: v for k, v in STATE.items() if k != "head.bias"})


KEYS = st.sampled_from(["model", "net", "state_dict", "module", "a.b", "Step 3", "norm", "head", "stages", "0", ""])
PREFIXES = st.sampled_from(["module.", "model.", "_orig_mod.", "backbone.", "net.0.", "encoder_q.", "norm.", "stem."])
NOISE = st.sampled_from(
    [
        {},
        {"epoch": 3, "cfg": "A: 1", "args": argparse.Namespace(lr=1)},
        {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}},
        {"n_averaged": torch.tensor(3), "loss.weight": torch.ones(5)},
        {"optimizer_state": MOMENTS, "history": [np.float64(1.5)] * 3},
    ]
)


@given(st.lists(st.tuples(KEYS, NOISE, st.booleans()), max_size=4), st.lists(PREFIXES, max_size=4), st.booleans())
def test_any_nesting_and_any_prefixes_load_to_the_same_tensors(tmp_path_factory, layers, prefixes, zipped):
    content = prefixed("".join(prefixes))
    for key, noise, in_list in layers:
        content = {**noise, key: [content] if in_list else content}
    path = tmp_path_factory.getbasetemp() / "nested.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model = tiny()
    assert posmlp.load_published(model, path).adapted == ()
    assert all(torch.equal(v, STATE[k]) for k, v in model.state_dict().items() if "num_batches" not in k)


# --- what is read from files -------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Settings:
    def __init__(self):
        self.lr, self.folder = np.float32(0.1), pathlib.Path("runs")

    def method(self):
        """A bound method is pickled by name."""


EXTRAS = {
    "Namespace": argparse.Namespace(lr=1e-3),
    "numpy": [np.float64(1), np.int64(2), np.bool_(True), np.str_("a"), np.arange(3), np.array(["a", None], object)],
    "numpy types and states": [
        np.dtype("f4"),
        np.random.default_rng(0),
        np.random.RandomState(0),
        np.datetime64("2020"),
    ],
    "keys": {np.int64(3): 1, torch.Size([1]): 2, pathlib.Path("a"): 3, (1, 2): 4, Colour.RED: 5, 6: 7, None: 8},
    "paths": [pathlib.Path("a"), pathlib.PureWindowsPath("b")],
    "times": [datetime.datetime.now(datetime.UTC), datetime.timedelta(1), datetime.date(2020, 1, 1)],
    "sets": [{1, 2}, frozenset([np.int64(1)]), slice(1, 2), range(3), 3 + 1j, b"bytes", bytearray(b"x"), 2**80],
    "collections": [collections.deque([1]), collections.Counter("aab"), collections.OrderedDict(a=1)],
    "objects": [
        Settings(),
        Settings().method,
        Colour.RED,
        types.SimpleNamespace(a=1),
        decimal.Decimal(1),
        OwnDict(a=1),
    ],
    "functions": [len, torch.nn.functional.gelu, functools.partial(sorted), re.compile("a"), os.getcwd, Settings],
    "torch": [torch.float16, torch.Size([1]), torch.device("cuda:0"), torch.strided, torch.nn.CrossEntropyLoss()],
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_harmless_extras_do_not_matter(extra, zipped, protocol, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"extra": extra, "model": STATE}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    model = tiny()
    assert posmlp.load_published(model, path).adapted == ()
    assert torch.equal(model.norm.weight, STATE["norm.weight"])


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint16]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64]


@st.composite
def tensor_dicts(draw):
    """Tensors of all types and shapes, some of them views of a common storage."""
    found = {}
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        tensor = torch.randn(shape).mul(3).to(draw(st.sampled_from(DTYPES)))
        if draw(st.booleans()):
            tensor = tensor.movedim(0, -1) if tensor.ndim else tensor.expand(2, 3)
        found[f"x{number}"] = tensor
        if tensor.ndim and len(tensor) > 1 and draw(st.booleans()):
            found[f"view{number}"] = tensor[1:]
    return found


def bytes_of(tensor):
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten()).view(torch.uint8)


@given(tensor_dicts(), st.booleans(), st.sampled_from([2, 4, 5]))
def test_tensors_are_read_as_they_were_saved(tmp_path_factory, tensors, zipped, protocol):
    path = str(tmp_path_factory.getbasetemp() / "tensors.pth")
    torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = read_weight_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        other = tensors[name]
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (other.dtype, other.shape, other.stride())
        assert bytes_of(tensor).equal(bytes_of(other))


def test_tensors_of_zip_files_are_mapped_and_not_read(tmp_path):
    """So an optimizer's state takes no memory."""
    path = str(tmp_path / "weights.pth")
    torch.save({"model": STATE, "optimizer": optimizer_state()}, path)
    content = read_weight_file(path)
    assert path in pathlib.Path("/proc/self/maps").read_text()
    content["model"]["norm.weight"].fill_(0)  # in memory alone
    assert torch.equal(read_weight_file(path)["model"]["norm.weight"], STATE["norm.weight"])


def test_a_zip_file_that_was_packed_again_loads(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    model = tiny()
    posmlp.load_published(model, tmp_path / "b.pth")
    assert torch.equal(model.norm.weight, STATE["norm.weight"])


# --- what is refused ---------------------------------------------------------------------------------------------


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def of_byte_order(order):
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, order if name.endswith("byteorder") else old.read(name))
    return file.getvalue()


def script():
    file = io.BytesIO()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), file)
    return file.getvalue()


def quantised(tensor):
    with pytest.warns(UserWarning, match="deprecated"):
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


RESNET = {"conv1.weight": torch.ones(64, 3, 7, 7), "bn1.weight": torch.ones(64), "fc.bias": torch.ones(5)}
VIT = {f"blocks.{i}.norm1.weight": torch.ones(64) for i in range(6)}
VIT |= {"norm.weight": torch.ones(64), "norm.bias": torch.ones(64), "head.weight": torch.ones(5, 64)}
NAN = {"norm.weight": torch.full((64,), torch.nan), "norm.bias": torch.tensor([torch.inf] + [0.0] * 63)}

REFUSED = {
    "web page": (lambda: b"\n<!DOCTYPE html><html>404</html>", ": a web page, not weights; download the file behind"),
    "error of a store": (lambda: b"<?xml version='1.0'?><Error/>", ": a web page, not weights"),
    "git-lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ": only a git-lfs pointer"),
    "TorchScript": (script, ": a TorchScript archive, which holds a program"),
    "empty": (lambda: b"", ": empty; expected a file written by torch.save or safetensors"),
    "zeros": (lambda: bytes(1000), ": not a file of weights"),
    "JSON": (lambda: b'{"weight_map": {}}', ": not a file of weights"),
    "gzip": (lambda: gzip.compress(saved(STATE)), ": a gzip archive; unpack it first"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n", ": an HDF5 file; expected"),
    "npz": (lambda: zipped(**{"a.npy": b"x"}), ": a zip archive that torch.save has not written"),
    "pickle": (lambda: pickle.dumps({"model": 1}), ": a Python pickle that torch.save has not written"),
    "cut": (lambda: saved(STATE)[:-100], ": damaged or cut short; copy or download it again"),
    "cut, legacy": (lambda: saved(STATE, _use_new_zipfile_serialization=False)[:-3], ": damaged or cut short"),
    "big-endian": (lambda: of_byte_order(b"big"), ": written on a big-endian machine"),
    "no tensors": (lambda: saved({"epoch": 3}), " holds no named tensors outside of optimizer states"),
    "optimizer alone": (lambda: saved({"optimizer_state": MOMENTS}), " holds no named tensors outside of optimizer"),
    "ResNet": (
        lambda: saved({"model": RESNET}),
        " is of another architecture: it holds model.conv1.weight, model.bn1.weight, model.fc.bias ... (3 tensors); "
        "expected stem.proj1.weight, stem.proj1.bias, ",
    ),
    "ViT": (lambda: saved(VIT), " is of another architecture: it holds blocks.0.norm1.weight, "),
    "other widths": (lambda: saved(tiny(dims=(32, 48, 64, 96)).state_dict()), " does not fit the model (8"),
    "deeper": (lambda: saved(tiny(depths=(2, 2, 1, 1)).state_dict()), " does not fit the model (16 problems)"),
    "NaN": (
        lambda: saved({"model": STATE | NAN}),
        "model.norm.weight holds 64 of 64 values that are NaN or infinite (the first of 2 such tensors); expected",
    ),
    "one infinite": (
        lambda: saved(STATE | {"norm.bias": NAN["norm.bias"]}),
        " cannot be used: norm.bias holds 1 of 64 values that are NaN or infinite; expected finite weights",
    ),
    "too large for float32": (
        lambda: saved(STATE | {"norm.bias": torch.full((64,), 1e300, dtype=torch.float64)}),
        " cannot be used: norm.bias holds 64 of 64 values",
    ),
    "integers": (
        lambda: saved(STATE | {"norm.bias": torch.ones(64, dtype=torch.int8)}),
        "norm.bias is a tensor of int8",
    ),
    "complex": (lambda: saved(STATE | {"norm.bias": torch.ones(64) * 1j}), "norm.bias is a tensor of complex64"),
    "quantised": (lambda: saved(STATE | {"head.weight": quantised(STATE["head.weight"])}), "is a quantised tensor"),
    "sparse": (
        lambda: saved(STATE | {"head.weight": STATE["head.weight"].to_sparse()}),
        "head.weight is a sparse tensor",
    ),
    "meta": (lambda: saved(STATE | {"head.weight": torch.empty(5, 64, device="meta")}), "head.weight is a meta tensor"),
}


def check_refusal(path, expected):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        posmlp.load_published(model, path)
    message = str(error.value)
    assert message.startswith(str(path)) and expected in message
    assert len(message.splitlines()) <= 6 and all(len(line) < 300 + len(str(path)) for line in message.splitlines())
    assert not re.search(r"\x1b|weights_only|add_safe_globals|Unpickl|torch\.load|Error", message)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("make", "expected"), REFUSED.values(), ids=REFUSED)
def test_all_else_is_refused_in_plain_words(make, expected, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(make())
    check_refusal(path, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["norm.weight", "stem.norm1.running_var", "stages.1.blocks.0.units.temporal.gate.table"]
)
def test_weights_that_are_not_finite_are_named_in_any_file(name, bad, tmp_path):
    state = {k: v.clone() for k, v in STATE.items()}
    state[name].view(-1)[[0, 2]] = bad
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    count = state[name].numel()
    check_refusal(tmp_path / "a.safetensors", f" cannot be used: {name} holds 2 of {count} values")
    with pytest.raises(CheckpointError, match=f"the checkpoint cannot be used: {name} holds 2 of {count} values"):
        posmlp.load_published(tiny(), state)
    loads({"model": STATE, "broken": {k: v for k, v in state.items() if k == name}}, tmp_path / "b.pth")


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


ATTACKS = {
    "posix.system": lambda target: Call(os.system, f"touch {target}"),
    "builtins.eval": lambda target: Call(eval, f"open({target!r}, 'w')"),
    "builtins.exec": lambda target: Call(exec, f"open({target!r}, 'w')"),
    f"{open.__module__}.open": lambda target: Call(open, target, "w"),  # _io since Python 3.12
    "subprocess.Popen": lambda target: Call(subprocess.Popen, ["touch", target]),
    "pathlib.Path.touch": lambda target: Call(pathlib.Path.touch, pathlib.Path(target)),
    "os.mkdir": lambda target: Call(os.makedirs, target),
    "builtins.map": lambda target: Call(map, os.mkdir, [target]),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ATTACKS)
def test_no_code_is_run(name, zipped, protocol, tmp_path):
    target = str(tmp_path / "target")
    content = {"model": STATE, "x": ATTACKS[name](target)}
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    called = {"os.mkdir": "os.makedirs"}.get(name, name)
    check_refusal(path, f": calls {called}, which can run code (nothing was run); expected")
    assert not os.path.exists(target)


@pytest.mark.parametrize(
    "program",
    [
        b"cargparse\nNamespace\nN}Vpath\nVbuiltins.set\ns\x86b",  # an attribute of a placeholder class
        b"ctorch._utils\n_rebuild_tensor_v2\nN}Vfunction\nN s\x86b".replace(b" ", b""),  # of a function of ours
        b"ctorch\nfloat32\nN}Vx\nNs\x86b",  # of a real object
    ],
    ids=["class", "function", "dtype"],
)
def test_a_file_cannot_change_what_later_files_get(program, tmp_path):
    torch.save({}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as old, zipfile.ZipFile(tmp_path / "bad.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x80\x02" + program + b"." if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(CheckpointError):
        posmlp.load_published(tiny(), tmp_path / "bad.pth")
    assert loads({"args": argparse.Namespace(a=1), "model": STATE}, tmp_path / "weights.pth") == ()


def test_a_container_that_holds_itself_ends():
    content = {"model": STATE}
    content["self"] = [content]
    posmlp.load_published(tiny(), content)


def test_a_checkpoint_is_checked_without_a_model_in_memory(tmp_path):
    torch.save({"model": STATE}, tmp_path / "a.pth")
    with torch.device("meta"):
        video, other = tiny(num_classes=9, frames=8), tiny(dims=(32, 48, 64, 96))
    state, report = fit_published(video, tmp_path / "a.pth")
    assert report == posmlp.load_published(tiny(num_classes=9, frames=8), tmp_path / "a.pth")
    assert state.keys() == {k for k in STATE if not k.endswith("num_batches_tracked")}
    assert next(video.parameters()).is_meta
    with pytest.raises(CheckpointError, match="does not fit"):
        fit_published(other, tmp_path / "a.pth")
