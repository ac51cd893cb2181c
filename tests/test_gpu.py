"""What only a real GPU can show: CUDA graphs, compiled kernels, whole runs of the scripts on it.

`pytest -m gpu` runs it, and so does `python eval/speed.py gpu`. Without a GPU all is skipped.
"""

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F

import bn_ablation
import ct
import fixup_penalty
import nofrost
from common import attacks, data, models, run
from common.data import shapes
from common.models.spread_norm import SpreadBatchNorm
from common.run.errors import out_of_memory
from eval import adversarial, corruptions, smoothness

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and `pytest -m gpu`"),
]

TINY = ["--dataset", "shapes", "--device", "cuda", "--limit", "512", "--eval-every", "1",
        "--overwrite", "--val-size", "100"]  # fmt: skip
SCRIPTS = {
    "ct": (ct, ["--arch", "wrn10-1", "--epochs", "2", "--corrupted-images", "50"]),
    "nofrost": (nofrost, ["--arch", "wrn10-1", "--epochs", "2", "--norms", "nf,bn,dual-bn",
                          "--robust-images", "20"]),
    "nofrost l2": (nofrost, ["--arch", "wrn10-1", "--epochs", "1", "--norms", "none",
                             "--attack-norm", "l2", "--robust-images", "20"]),
    "nofrost trades": (nofrost, ["--arch", "wrn10-1", "--epochs", "1", "--norms", "bn", "--loss",
                                 "trades", "--robust-images", "0"]),
    "nofrost streams": (nofrost, ["--arch", "wrn10-1", "--epochs", "1", "--norms", "nf",
                                  "--streams", "clean,tda,adv", "--robust-images", "0"]),
    "fixup": (fixup_penalty, ["--arch", "wrn10-1", "--epochs", "2", "--variants",
                              "none,fixup+penalty,bn-aux", "--aux-batch", "64"]),
    "fixup fp16": (fixup_penalty, ["--arch", "wrn10-1", "--epochs", "2", "--variants", "bn",
                                   "--precision", "fp16", "--mixup", "1"]),
    "augmix": (ct, ["--arch", "wrn10-1", "--epochs", "1", "--lam", "0", "--policy", "augmix",
                    "--corrupted-images", "0"]),
    "bn_ablation": (bn_ablation, ["--arch", "vgg11-16", "--steps", "12", "--measure-every", "4"]),
}  # fmt: skip


def network(norm):
    """A network on the GPU with statistics that are not those of the start."""
    run.get_device("cuda")  # fp32 is IEEE's
    torch.manual_seed(0)
    net = models.build("wrn10-1", norm, 10).cuda().to(memory_format=torch.channels_last)
    x, _ = shapes.make(64, device="cuda")
    net.train()(run.to_float(x))
    return net.eval()


def images(count=16):
    x, y = shapes.make(count, seed=1, device="cuda")
    return run.to_float(x), y


@pytest.mark.parametrize("norm", ["bn", "none", "nf", "gn", "dual-bn"])
def test_captured_passes_give_logits_and_gradients(norm):
    """On a real GPU, after the weights changed too, and between other work on the device."""
    net, (x, y) = network(norm), images()
    graphs = attacks.Graphs()
    for change in (0, 0.1):
        with torch.no_grad():
            next(net.parameters()).add_(change)
        a = x.clone().requires_grad_()
        expected = net(a)
        (gradient,) = torch.autograd.grad(F.cross_entropy(expected, y), a)
        with attacks.frozen(net) as module:
            fast = graphs.get(module, x, contextlib.nullcontext, torch.float32)
        b = (x + 0).requires_grad_()
        logits = fast(b)
        (found,) = torch.autograd.grad(F.cross_entropy(logits, y), b)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert F.cosine_similarity(found.flatten(), gradient.flatten(), dim=0) > 0.9999
    assert len(graphs.kept) == 1


@pytest.mark.parametrize("norm", ["bn", "nf"])
def test_a_captured_attack_is_the_attack(norm):
    """Of one start, one step of PGD: the same images where the gradient is not at zero."""
    net, (x, y) = network(norm), images()
    noise = attacks.unit_noise(x.shape, device="cuda")
    ours = [
        attacks.pgd(net, x, y, 8, steps=1, noise=noise, capture=graphs)
        for graphs in (None, attacks.Graphs())
    ]
    assert ((ours[0] - ours[1]).abs() > 0.5 / 255).float().mean() < 1e-3
    assert (ours[1] - x).abs().max() <= 8 / 255 + 1e-6
    before, after = (F.cross_entropy(net(z), y) for z in (x, ours[1]))
    assert after > before


def test_a_network_with_hooks_is_not_captured():
    """A replay would leave the hook out."""
    net, (x, y) = network("bn"), images()
    graphs, seen = attacks.Graphs(), []
    net.fc.register_forward_hook(lambda *_: seen.append(1))
    attacks.pgd(net, x, y, 8, steps=3, capture=graphs)
    assert len(seen) >= 3 and not graphs.kept


@pytest.mark.parametrize("norm", ["bn", "none", "nf", "fixup"])
def test_compiled_on_a_gpu(norm):
    """Kernels launched together give the logits and gradients of the plain network."""
    net, (x, y) = network(norm), images(32)
    net.train()
    torch.compiler.reset()
    fast = run.compiled(net, torch.device("cuda"))
    found = []
    for call in (net, *(fast,) * 4):  # of the compiled ones the last is a replay
        torch.compiler.cudagraph_mark_step_begin()
        loss = F.cross_entropy(call(x), y)
        net.zero_grad()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        found.append((loss.item(), gradient))
    for loss, gradient in found[1:]:
        assert abs(loss - found[0][0]) < 1e-4
        assert F.cosine_similarity(gradient, found[0][1], dim=0) > 0.999
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spread_batch_norm_is_batch_norm(dtype):
    """With one process: output, gradients and running statistics are those of torch in double
    precision, to the rounding of their own type. The host never waits."""
    x, grad = torch.randn(2, 32, 16, 8, 8, device="cuda").to(dtype).unbind()
    affine = torch.rand(2, 16, device="cuda") + 0.5
    found = []
    for spread in (True, False):
        kind = {} if spread else {"dtype": torch.float64}
        a = x.to(memory_format=torch.channels_last, **kind).detach().requires_grad_()
        weight, bias = (v.to(**kind).detach().clone().requires_grad_() for v in affine)
        running = torch.zeros_like(weight.detach()), torch.ones_like(weight.detach())
        torch.cuda.set_sync_debug_mode("error")
        try:
            if spread:
                out = SpreadBatchNorm.apply(a, weight, bias, *running, 0.1, 1e-5)
            else:
                out = F.batch_norm(a, *running, weight, bias, training=True, eps=1e-5)
            out.backward(grad.to(**kind))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((out, a.grad, weight.grad, bias.grad, *running))
    for ours, exact, like in zip(*found, (x, x, *affine, *affine), strict=True):
        assert ours.dtype == like.dtype
        room = 16 * torch.finfo(ours.dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= room


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_on_a_gpu_comes_to_its_table(tmp_path, capsys, name):
    script, options = SCRIPTS[name]
    words = [*TINY, *options, "--out", str(tmp_path / "run")]
    script.main(script.parse_args(words))
    printed = capsys.readouterr()
    assert "Next:" in printed.out and "cuda" in printed.out
    assert "Traceback" not in printed.err
    ends = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert ends[-1]["event"] == "end"


def test_compiled_and_captured_do_not_meet(tmp_path):
    script, options = SCRIPTS["nofrost"]
    with pytest.raises(run.UserError, match="--no-capture"):
        script.main(
            script.parse_args([*TINY, *options, "--compile", "--out", str(tmp_path / "run")])
        )


def test_compiled_training_on_a_gpu(tmp_path, capsys):
    script, options = SCRIPTS["ct"]
    words = [*TINY, *options, "--compile", "--out", str(tmp_path / "run")]
    torch._dynamo.utils.counters.clear()
    script.main(script.parse_args(words))
    assert "CT" in capsys.readouterr().out
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_cpu_and_gpu_learn_the_same(tmp_path):
    """The first losses of a training in fp32, which rounding has not taken apart yet."""
    losses = {}
    for device in ("cpu", "cuda"):
        words = [*TINY, "--device", device, "--arch", "wrn10-1", "--epochs", "1", "--lam", "0",
                 "--precision", "fp32", "--log-every", "1", "--batch-size", "32",
                 "--corrupted-images", "0", "--out", str(tmp_path / device)]  # fmt: skip
        ct.main(ct.parse_args(words))
        rows = [json.loads(line) for line in (tmp_path / device / "log.jsonl").open()]
        losses[device] = next(row["loss"] for row in rows if row.get("epoch"))
    assert losses["cpu"] == pytest.approx(losses["cuda"], rel=2e-2)


def test_evaluations_on_a_gpu_come_to_their_tables(tmp_path, capsys):
    words = [*TINY, "--arch", "wrn10-1", "--epochs", "2", "--lam", "0", "--corrupted-images", "0"]
    ct.main(ct.parse_args([*words, "--out", str(tmp_path / "run")]))
    network = str(tmp_path / "run" / "last.pt")
    other = str(tmp_path / "l2.json")
    for script, options in (
        (adversarial, ["--attacks", "standard,pgd-20", "--limit", "16"]),
        (adversarial, ["--attacks", "apgd", "--norm", "l2", "--eps", "64", "--limit", "16",
                       "--json", other]),
        (corruptions, ["--limit", "50", "--adapt", "50"]),
        (smoothness, ["--limit", "16"]),
    ):  # fmt: skip
        script.main(script.parse_args([network, *options, "--device", "cuda"]))
    printed = capsys.readouterr().out
    assert "worst of all" in printed and "mean (15 x 5)" in printed and "LIGS" in printed


def test_out_of_memory_on_a_gpu_names_the_batch(tmp_path):
    words = [*TINY, "--arch", "wrn28-10", "--epochs", "1", "--limit", "0", "--lam", "0",
             "--batch-size", "9000", "--precision", "fp32", "--no-compile",
             "--image-size", "32", "--out", str(tmp_path / "run")]  # fmt: skip
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        args = ct.parse_args(words)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            ct.main(args)
        assert "--batch-size 9000" in out_of_memory(caught.value, vars(args))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_data_of_a_gpu_is_that_of_the_cpu():
    """The batches of a training, augmented on the device, are the same bytes."""
    drawn = []
    for device in ("cpu", "cuda"):
        task = data.load("shapes", "none", limit=256, device=device)
        batches = data.Batches(task.train, 64, 0, augment=True, flip=task.flip)
        drawn.append([tuple(t.cpu() for t in batches(step)) for step in range(4)])
    for (x, y), (u, v) in zip(*drawn, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
