"""Runs over several processes (gloo, CPU): the numbers of one process, whatever their number."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from common import run
from common.models.spread_norm import SpreadBatchNorm

# Imports once, then forks the processes of a job with what torchrun puts in their environment.
JOB = """
    import importlib.util, os, sys, torch
    from torch.utils.tensorboard import SummaryWriter
    from common import data, models, run
    import ct, bn_ablation, fixup_penalty, nofrost
    torch.set_num_threads(1)
    data.sets.SHAPES_SIZES.update(train=96, test=41)
    world, port = int(sys.argv[1]), sys.argv[2]

    def job():
        pass  # the body

    children = []
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            code = 1
            try:
                if world > 1:
                    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
                    values = str(rank), str(rank), str(world), "127.0.0.1", port
                    os.environ.update(zip(names, values))
                run.cli(lambda _: job(), lambda: None)
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                import traceback
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("exit codes", codes)
    sys.exit(max(codes))
"""


def processes(world, body):
    """Run `body` in `world` processes; what they print. Every one must end with status 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    body = textwrap.indent(textwrap.dedent(body), "    ")
    code = textwrap.dedent(JOB).replace("    pass  # the body", body)
    command = [sys.executable, "-c", code, str(world), port]
    done = subprocess.run(command, cwd=run.ROOT, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# 20 steps each, without BatchNorm, and without an attack: its sign makes steps of rounding.
# GroupNorm multiplies differences of rounding, and mixup puts
# them beside the kinks of ReLU, by more than 1e-5 leaves room for in fp32: those two run in fp64.
TRAINERS = {
    "ct": "--arch resnet8 --norm none --lr 0.02 --lam 1 --epochs 5 --no-baseline "
    "--corrupted-images 11 --teacher-epochs 5 --teacher-lr 0.02",
    "bn_ablation": "--arch vgg11-4 --norms none --lrs 0.1 --steps 20 --measure-every 10 "
    "--log-every 10",
    "nofrost": "--arch wrn10-1 --norm nf --lam 0 --lr 0.02 --epochs 5 "
    "--attack-steps 2 --robust-images 30 "
    "--image-size 32 --eps 8",
}
IN_FP64 = {
    "ct": "--arch resnet8 --norm gn --lam 1 --epochs 5 --no-baseline --corrupted-images 0 "
    "--teacher-epochs 5",
    "fixup_penalty": "--arch resnet8 --norm none --mixup 1 --penalty embedding --epochs 5 "
    "--corrupted-images 0 --limit 0 --augment",
}
DOUBLE = """
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
run.to_float = lambda x, single=run.to_float: single(x).double()
sys.modules["common.run.evaluate"].to_float = run.to_float
"""
ALWAYS = "--batch-size 24 --precision fp32 --device cpu --dataset shapes"


def train_all(folder, world):
    body = ""
    for kind, trainers in (("", TRAINERS), ("-fp64", IN_FP64)):
        body += DOUBLE if kind else ""
        for name, options in trainers.items():
            argv = [*options.split(), *ALWAYS.split(), "--out", str(folder / (name + kind))]
            body += f"{name}.main({name}.parse_args({argv!r}))\n"
    return processes(world, body)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def distance(a, b):
    """Largest difference of two files' weights."""
    a, b = weights(a), weights(b)
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


class Trained(dict):
    """{number of processes: folder with a run of every trainer}, trained when asked for."""

    def __init__(self, factory):
        super().__init__()
        self.factory = factory

    def __missing__(self, world):
        self[world] = self.factory.mktemp(f"world{world}")
        train_all(self[world], world)
        return self[world]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory)


WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


FILES = ["ct/teacher.pt", "ct/last.pt", "bn_ablation/none-lr0.1.pt", "nofrost/last.pt",
         "ct-fp64/last.pt", "fixup_penalty-fp64/last.pt"]  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("file", FILES)
def test_weights_after_20_steps(trained, world, file):
    """Without BatchNorm, to 1e-5 of those of one process."""
    assert run.load_checkpoint(trained[world] / file)["step"] == 20
    assert distance(trained[1] / file, trained[world] / file) < 1e-5


@pytest.mark.parametrize("world", WORLDS)
def test_one_process_writes(trained, world):
    """One event file and each line of the log once, with the numbers of one process."""
    for name in TRAINERS:
        logs = []
        for folder in (trained[1] / name, trained[world] / name):
            events = list(folder.glob("**/events.out.*"))
            assert events and len({file.parent for file in events}) == len(events)
            text = (folder / "log.jsonl").read_text().splitlines()
            logs.append([json.loads(line) for line in text])
        a, b = ([line for line in log if "loss" in line] for log in logs)
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)
        ends = [log[-1] for log in logs]
        assert ends[0]["event"] == "end" and ends[0].keys() == ends[1].keys()


MEASURE = """
    import json
    from torch import nn
    run.get_device("cpu")
    rng = torch.Generator().manual_seed(5)
    x, y = torch.rand(8, 3, 6, 6, generator=rng).double(), torch.randint(10, (8,), generator=rng)
    found = {}

    def difference(a, b):
        return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))

    def network(norm):
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.Flatten()]
        net = nn.Sequential(*layers, nn.Linear(16, 10)).double()
        net.spec = {"norm": "bn"}
        return net

    def step(net, x, y):
        loss = 0
        for kind in ("clean", "adversarial"):  # two passes, as those of nofrost.py
            models.use_statistics(net, kind)
            loss = loss + nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss.detach()

    exchanges, gather = [], torch.distributed.all_gather

    def counted(parts, x):
        exchanges.append(x.numel())
        return gather(parts, x)

    torch.distributed.all_gather = counted
    for norm in (models.BatchNorm, models.DualBatchNorm):
        alone, model = network(norm), network(norm)
        net = run.spread(model)
        for _ in range(2):
            exchanges.clear()
            own = run.rows(len(y))
            run.world, several = (lambda: 1), run.world
            loss = step(alone, x, y)
            run.world = several
            losses = loss, run.mean(step(net, x[own], y[own]))
        grads = ([p.grad for p in m.parameters()] for m in (alone, model))
        assert alone.state_dict().keys() == model.state_dict().keys()
        states = (m.state_dict().values() for m in (alone, model))
        logits = (m.eval()(x).detach() for m in (alone, model))
        found[norm.__name__] = [difference(*pair) for pair in ([[v] for v in losses], grads,
                                                               states, logits)]

    found["exchanges"] = exchanges
    torch.manual_seed(1)
    model, x = models.build("resnet8", "none").eval(), torch.rand(41, 3, 32, 32)
    y = torch.randint(10, (41,))
    for n in (41, 3, 1):  # of 4 processes some get no image
        alone = run.metrics(run.predict(model, x[:n]), y[:n])
        spread = run.evaluate(model, data.Images(x[:n], y[:n]))
        part = run.rows(n)
        rows = run.summed(torch.tensor(part.stop - part.start)).item()
        found[f"images {n}"] = [rows, *(spread[k] - alone[k] for k in ("error", "loss", "ece"))]

    images = data.Images(torch.arange(16).view(16, 1, 1, 1).expand(16, 3, 8, 8).to(torch.uint8),
                         torch.arange(16))
    batches = data.Batches(images, 8, 0, augment=False)
    whole = data.Batches(images, 8, 0, augment=False, whole=True)(1)[1].tolist()
    mine = batches(1)
    found["rows"] = [mine[1].tolist(), whole[run.rows(8)]]
    found["pictures"] = (mine[0][:, 0, 0, 0] * 255).round().int().tolist()
    print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=[2, 4])
def measured(request):
    return request.param, json.loads(processes(request.param, MEASURE).splitlines()[0])


def test_batch_norm_is_that_of_the_global_batch(measured):
    """In fp64: loss, gradients, running statistics and logits equal those of one process."""
    for norm in ("BatchNorm", "DualBatchNorm"):
        assert max(measured[1][norm]) < 1e-12


def test_batch_norm_exchanges_once_a_layer_and_pass(measured):
    """Two layers of 4 channels, two forward and two backward passes: two numbers a channel."""
    assert measured[1]["exchanges"] == 8 * [2 * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 16, 8, 8), (32, 16)])
def test_spread_batch_norm_of_one_process_is_that_of_torch(dtype, shape):
    """Output, gradients and running statistics, within the rounding of their dtype."""
    rng, found = torch.Generator().manual_seed(3), []
    x, grad = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
    affine = torch.rand(2, 16, generator=rng) + 0.5
    for spread in (True, False):
        x, weight, bias = (v.detach().clone().requires_grad_() for v in (x, *affine))
        running = torch.zeros(16), torch.ones(16)
        if spread:
            out = SpreadBatchNorm.apply(x, weight, bias, *running, 0.1, 1e-5)
        else:
            out = F.batch_norm(x, *running, weight, bias, training=True, eps=1e-5)
        out.backward(grad)
        found.append((out, x.grad, weight.grad, bias.grad, *running))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        room = 4 * torch.finfo(ours.dtype).eps * theirs.abs().max()
        assert (ours - theirs).abs().max() <= room


def test_evaluation_counts_every_image_once(measured):
    for n in (41, 3, 1):
        rows, error, loss, ece = measured[1][f"images {n}"]
        assert rows == n and error == 0 and abs(loss) < 1e-6 and abs(ece) < 1e-4


def test_each_process_gets_its_own_rows_of_the_global_batch(measured):
    world, found = measured
    own, sliced = found["rows"]
    assert own == sliced == found["pictures"] and len(own) == 8 // world


def test_refusals(tmp_path):
    body = ""
    for script, options in (
        ("ct", "--batch-size 25"),
        ("fixup_penalty", "--norm bn-aux --limit 0"),
        ("bn_ablation", "--arch dln25 --norms none --batch-size 128"),
    ):
        argv = [*ALWAYS.split(), *options.split(), "--out", str(tmp_path / script)]
        body += f"try: {script}.main({script}.parse_args({argv!r}))\n"
        body += "except run.UserError as error: print(error)\n"
    printed = processes(2, body)
    for text in ("divide among 2", "norm bn-aux: its statistics need one", "for one process"):
        assert text in printed
    assert not list(tmp_path.iterdir())


def test_a_signal_to_one_stops_all_after_the_same_step(tmp_path):
    """SIGUSR1 to process 1 within step 3: all agree at step 10, one checkpoint, exit status 0."""
    argv = [*TRAINERS["ct"].split(), *ALWAYS.split(), "--lam", "0", "--out", str(tmp_path / "r")]
    body = f"""
        import signal
        real = run.Loop.step
        def step(self, lr, clip=0.0):
            if self.done == 4 and run.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return real(self, lr, clip)
        run.Loop.step = step
        ct.main(ct.parse_args({argv!r}))
    """
    printed = processes(2, body)
    assert "stopped after step 10 of" in printed and "exit codes [0, 0]" in printed
    assert "not finished, exit status 0" in printed
    assert "&& torchrun --standalone --nproc-per-node=2 " in printed
    assert run.load_checkpoint(tmp_path / "r")["step"] == 10


# --- evaluations ----------------------------------------------------------------------------------

EVALUATE = """
    for name, options in (
        ("corruptions", ["--corruptions", "gaussian_noise,jpeg_compression,spatter"]),
        ("adversarial", ["--attacks", "pgd-2,square-20", "--batch-size", "7"]),
    ):
        path = run.ROOT / "eval" / f"{{name}}.py"
        spec = importlib.util.spec_from_file_location(f"eval_{{name}}", path)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        argv = [{checkpoint!r}, "--json", {folder!r} + f"/{{name}}.json", "--device", "cpu"]
        script.main(script.parse_args([*argv, "--limit", "30", *options]))
"""


def test_evaluations(trained, tmp_path):
    """Corruptions and attacks on 30 images over 4 processes: the accuracies of one process."""
    checkpoint, found = str(trained[1] / "ct" / "last.pt"), {}
    for world in (1, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        processes(world, EVALUATE.format(checkpoint=checkpoint, folder=str(folder)))
        for name in ("corruptions", "adversarial"):
            (entry,) = json.loads((folder / f"{name}.json").read_text())["checkpoints"]
            keys = ("error",) if name == "corruptions" else ("accuracy",)
            found[world, name] = {key: entry[key] for key in keys}
        assert not (folder / "adversarial.json.state").exists()
    for name in ("corruptions", "adversarial"):
        assert found[1, name] == found[4, name]


# --- torchrun -------------------------------------------------------------------------------------

WORKER = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import ct
    from common import data, run
    data.sets.SHAPES_SIZES.update(train=96, test=41)
    real = run.Loop.step
    def step(self, lr, clip=0.0):
        again = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if self.done == 10 and os.environ["RANK"] == "1" and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, lr, clip)
    run.Loop.step = step
    run.cli(ct.main, ct.parse_args)
"""


def test_a_killed_process_restarts_the_job_from_its_checkpoint(trained, tmp_path):
    """torchrun --max-restarts=1, process 1 killed within step 9: it goes on from step 8 to the
    weights of one process."""
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER).format(root=str(run.ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=1", str(tmp_path / "worker.py"), *TRAINERS["ct"].split(),
               *ALWAYS.split(), "--out", str(tmp_path / "r"), "--eval-every", "1",
               "--teacher", str(trained[1] / "ct" / "teacher.pt")]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True, timeout=500,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    events = [line["event"] for line in lines if "event" in line]
    assert events == ["start", "resume", "end"]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3, 4, 5]
    assert distance(tmp_path / "r" / "last.pt", trained[1] / "ct" / "last.pt") < 1e-5
