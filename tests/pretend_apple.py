"""A pretend device without float64 and with the operators that torch has for Apple's GPUs: what asks it for others is an error that names the line.

    python tests/pretend_apple.py train|sparse|evaluate|features|generate|demo

Tensors of the device wrap tensors of the CPU, which do the work. The kind of device is called "apple" here, since PyTorch lets nobody stand in for "mps"."""

import copy
import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torchgen
import yaml
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16, torch.float32]

    def is_autocast_enabled(self):
        return False

    def __getattr__(self, name):
        if name in ("get_rng_state", "set_rng_state"):
            return lambda *_, **__: None
        raise AttributeError(name)


_setup_privateuseone_for_python_backend("apple", Backend())
DEVICE = torch.device("apple", 0)


class NoFloat64(TypeError):
    "What Metal says."


class NoKernel(NotImplementedError):
    "What torch says of an operator that it has for other devices only."


def here() -> str:
    "The line of the package that is being run."
    frames = [f for f in traceback.extract_stack() if "/e2e_sae_nb/" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else "outside of this package"


def without_kernel() -> set[str]:
    "Operators that torch's own table of kernels has for other devices, but neither for MPS nor in terms of others."
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    table = {entry["func"].split("(")[0]: entry for entry in yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)}

    def kernels(name: str) -> set[str]:
        own = {key.strip() for keys in table[name].get("dispatch") or {} for key in keys.split(",")}
        delegate = table[name].get("structured_delegate")
        return own | (kernels(delegate) if delegate else set())

    found = {name: kernels(name) for name in table}
    return {f"aten::{name}" for name, keys in found.items() if keys and "MPS" not in keys and not any(key.startswith("Composite") for key in keys)}


CHOSEN = {"aten::_fused_sdp_choice", "aten::_scaled_dot_product_flash_attention_for_cpu"}  # torch chooses others on MPS
MISSING = without_kernel() - CHOSEN
assert "aten::sparse_sampled_addmm" in MISSING and not {"aten::mm", "aten::searchsorted.Tensor", "aten::index_add_"} & MISSING


class Apple(torch.Tensor):
    "A tensor on the pretend device."

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise NoFloat64(f"the device has no float64: {here()}")
        if inner.layout != torch.strided:
            raise NoKernel(f"the device computes nothing with {inner.layout} tensors: {here()}")
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
                                                   dtype=inner.dtype, layout=inner.layout, device=DEVICE)
        made.inner = inner
        return made

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self, **_):
        return f"Apple({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    flat = pytree.tree_leaves((args, kwargs))
    there = any(isinstance(x, Apple) for x in flat)
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device).type == "apple"
    name, overload = function._schema.name, function._schema.overload_name
    if there and (f"{name}.{overload}" if overload else name) in MISSING:
        raise NoKernel(f"the device has no {name}: {here()}")
    plain = lambda x: x.inner if isinstance(x, Apple) else x
    args_, kwargs_ = pytree.tree_map(plain, (args, kwargs))
    if kwargs_.get("device") is not None:
        kwargs_ = kwargs_ | {"device": torch.device("cpu")}
    if name == "aten::_to_copy" and there and kwargs_.get("dtype") == torch.float64:
        Apple(torch.empty(0, dtype=torch.float64))  # refused
    out = function(*args_, **kwargs_)
    if name.endswith("_") and not name.endswith("__"):
        return args[0] if args and isinstance(args[0], torch.Tensor) else None
    if "out" in kwargs:
        return kwargs["out"]
    return pytree.tree_map(lambda x: Apple(x) if there and isinstance(x, torch.Tensor) and not isinstance(x, Apple) else x, out)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def sparse_steps() -> None:
    "Every architecture's step with few active latents: found, encoded, decoded and taken back, as the dense definition has it on the CPU."
    from e2e_sae_nb.architectures import ARCHITECTURES, new_sae
    from e2e_sae_nb.sparse_step import SparseCode, find_positive, sparse_forward

    for architecture in ARCHITECTURES:
        options = {"k": 3} if architecture in ("topk", "batchtopk", "matryoshka") else {}
        plain = new_sae(architecture, 12, 640, **options)
        with torch.no_grad():
            plain.b_enc -= 1.0
        there, x = copy.deepcopy(plain).to(DEVICE), torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0))
        leaf = x.to(DEVICE).requires_grad_()
        acts, expected = sparse_forward(there, leaf), plain(x.requires_grad_())
        assert isinstance(acts.c, SparseCode) and acts.output.device == DEVICE and len(acts.c.values), architecture
        for found in (acts, expected):
            (found.output.square().sum() + (0.0 if found.penalty is None else found.penalty.sum())).backward()
        pairs = [(acts.output, expected.output), (acts.c.dense(), expected.c), (leaf.grad, x.grad)]
        pairs += [(a.grad, b.grad) for a, b in zip(there.parameters(), plain.parameters(), strict=True) if b.grad is not None]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-3, atol=1e-4, msg=lambda m, a=architecture: f"{a}: {m}")
        assert acts.c.fired().cpu().tolist() == (expected.c > 0).flatten(0, 1).sum(0).tolist()
        flat = leaf.detach().flatten(0, 1)
        ways = [find_positive(there.W_enc.T, there.b_enc, flat, 1.0, screen) for screen in (False, True)]
        torch.testing.assert_close(ways[0].values.cpu(), ways[1].values.cpu(), rtol=1e-4, atol=1e-5)


def measured_demo(base: dict) -> None:
    "The demo's measuring of a machine, whose steps are dense, then sparse."
    from e2e_sae_nb import demonstration, sparse_step
    from e2e_sae_nb.members import FrontierConfig
    from e2e_sae_nb.state import subject_for

    frontier = {"local": {"lr": 1e-2, "sparsity": [2.0]}, "e2e": {"lr": 1e-2, "sparsity": [0.25]}}
    config = FrontierConfig.from_dict({key: value for key, value in base.items() if key != "lr"} | {"frontier": frontier})
    found, plain = [], sparse_step._compress
    sparse_step._compress = lambda *args: found.append(args) or plain(*args)
    speed = demonstration.measure_speed(config, subject_for(config.base))
    assert found and speed.sparse > 0, "no sparse step was measured"


def main(what: str) -> None:
    import e2e_sae_nb.core as core
    from e2e_sae_nb import RunConfig, evaluate, train
    from e2e_sae_nb.models import tiny_model

    core.WITHOUT_FLOAT64 = (*core.WITHOUT_FLOAT64, "apple")
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("gpt2", n_layer=3, vocab_size=4096).save_pretrained(f"{folder}/model")
        from transformers import AutoTokenizer
        AutoTokenizer.from_pretrained(core.data_path("docstrings-lm")).save_pretrained(f"{folder}/model")
        lines = [{"text": f"document {i}: " + f"the number {i} is {'even' if i % 2 else 'odd'}. " * 9} for i in range(400)]
        Path(folder, "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        base = {"tlens_model_path": f"{folder}/model", "saes": {"sae_positions": "blocks.1.hook_resid_pre", "dict_size_to_input_ratio": 4.0},
                "train_data": {"dataset_name": f"{folder}/a.jsonl", "n_ctx": 16, "held_out_share": 0.2}, "lr": 1e-3, "batch_size": 4, "n_samples": 48,
                "eval_n_samples": 8, "save_dir": folder, "log_every_n_grad_steps": 1, "compile": False, "compute_dtype": "float32", "device": "apple",
                "act_frequency_n_tokens": 64, "collect_act_frequency_every_n_samples": 8}
        losses = {"local": {"sparsity": {"coeff": 0.3}, "out_to_in": {"coeff": 1.0}},
                  "e2e": {"sparsity": {"coeff": 0.3}, "logits_kl": {"coeff": 1.0}, "in_to_orig": {"hook_positions": "blocks.2.hook_resid_post", "total_coeff": 1.0}}}
        with Mode():
            runs = {}
            if what == "sparse":
                sparse_steps()
            if what == "demo":
                measured_demo(base)
            for kind in {"train": ("local", "e2e"), "sparse": (), "demo": ()}.get(what, ("e2e",)):
                saes = base["saes"] | ({"resample_every_n_samples": 16, "dead_after": 64, "activation_norm": "unit"} if kind == "local" else {})
                config = RunConfig.from_dict(base | {"loss": losses[kind], "saes": saes, "wandb_run_name": kind})
                runs[kind] = train(config)
                assert all(p.device.type in ("apple", "cpu") for p in runs[kind].saes["blocks.1.hook_resid_pre"].parameters())
            if what == "evaluate":
                print(evaluate(runs["e2e"]).kl)
            if what == "features":
                from e2e_sae_nb.dashboard import features
                from e2e_sae_nb.state import subject_for
                features(runs["e2e"], subject_for(runs["e2e"].config), n_tokens=256).write(Path(folder, "features.html"))
            if what == "generate":
                from e2e_sae_nb.generation import Sampling
                print(Sampling(temperature=1.0).choose(torch.randn(4096).to(DEVICE), 0))
    print("whole")


if __name__ == "__main__":
    main(sys.argv[1])
