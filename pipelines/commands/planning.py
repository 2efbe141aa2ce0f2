"""``posmlp init``, ``posmlp doctor``, ``posmlp plan`` and ``posmlp cost``: before a run."""

from __future__ import annotations

import argparse
import json

from pipelines.commands.options import (
    Commands,
    add_command,
    add_recipe,
    load_recipe_and_data,
    not_negative,
    positive,
    positive_float,
)
from posmlp.errors import UserError

# For the help text. Copies, because the modules that define them import PyTorch; tests/unit/pipelines/test_plan.py
# compares them.
GPUS = ("H200", "H100 PCIe", "H100 NVL", "H100", "A100", "L40S", "L4", "A10", "T4", "V100")
VIDEO_SOURCES = ("as-is", "shard", "key250", "key32", "key12", "key4")
ASSUMED_MFU = 0.15


def add_commands(commands: Commands) -> None:
    add_init(commands)
    add_doctor(commands)
    add_plan(commands)
    add_cost(commands)


def add_init(commands: Commands) -> None:
    init = add_command(
        commands,
        "init",
        run_init,
        "look at your own videos, and write a recipe that trains on them",
        description="Look at a folder of videos (one subfolder per class) or a list, and write a recipe for it.",
    )
    init.add_argument("data", help="the folder, or a list with the columns path and label")
    init.add_argument("--out", metavar="FILE", help="the recipe; it must not exist (default: NAME.yaml)")
    init.add_argument(
        "--group-by",
        metavar="COLUMN",
        help="keep videos with the same value of this column on one side of the split; `folder`: of the same folder",
    )


def run_init(args: argparse.Namespace) -> None:
    from pipelines.planning.starter import init

    print(init(args.data, args.out, args.group_by))


def add_doctor(commands: Commands) -> None:
    doctor = add_command(commands, "doctor", run_doctor, "find what would stop or slow a run on this cluster")
    add_recipe(doctor, "scaling.workers=8; without a recipe only Ray is checked", required=False)
    doctor.add_argument("--address", help="address of the Ray cluster (default: as for posmlp train)")


def run_doctor(args: argparse.Namespace) -> int:
    """Return exit code 1 if a check failed."""
    if args.recipe and "=" in args.recipe:
        raise UserError(f"override {args.recipe!r} without a recipe; name a recipe before it")
    config = load_recipe_and_data(args.recipe, args.overrides) if args.recipe else None
    from pipelines.planning.doctor import doctor, print_findings

    return int(not print_findings(doctor(config, args.address)))


def add_plan(commands: Commands) -> None:
    plan = add_command(
        commands, "plan", run_plan, "estimate what a run needs on a cluster: rates, cores, bytes, bottleneck"
    )
    add_recipe(plan, "train.global_batch=1024")
    plan.add_argument(
        "--gpus", type=positive, required=True, help="number of GPUs in all; each runs one training worker"
    )
    nodes = plan.add_mutually_exclusive_group()
    nodes.add_argument("--gpus-per-node", type=positive, help="GPUs per node (default: 8, or all if there are fewer)")
    nodes.add_argument("--nodes", type=positive, help="number of nodes with GPUs")
    plan.add_argument(
        "--gpu",
        help=f"GPU model: {', '.join(GPUS)}; for another one give --tflops (default: H100)",
    )
    plan.add_argument("--tflops", type=positive_float, help="peak TFLOP/s of a GPU, in place of its data sheet")
    plan.add_argument(
        "--mfu",
        type=positive_float,
        help=f"share of the peak that training reaches (default: {ASSUMED_MFU:g}, assumed)",
    )
    plan.add_argument(
        "--measured",
        metavar="FILE",
        help="gpu.json of `python benchmarks/gpu.py`: rates of your GPU, in place of --gpu, --tflops and --mfu",
    )
    plan.add_argument("--cores", type=positive, default=96, help="CPU cores per GPU node (default: %(default)s)")
    plan.add_argument(
        "--decode-nodes", type=not_negative, default=0, help="number of nodes without GPUs (default: %(default)s)"
    )
    plan.add_argument(
        "--decode-cores", type=positive, default=64, help="CPU cores per node without GPUs (default: %(default)s)"
    )
    plan.add_argument(
        "--gbit", type=positive_float, default=100.0, help="network of a node in Gbit/s (default: %(default)g)"
    )
    plan.add_argument(
        "--memory-gb", type=positive_float, default=256.0, help="memory of a node in GB (default: %(default)g)"
    )
    plan.add_argument(
        "--store-share",
        type=positive_float,
        default=0.3,
        help="share of the memory that is Ray's object store (default: %(default)g)",
    )
    plan.add_argument("--videos", type=positive, help="number of training videos (default: those of the recipe's list)")
    plan.add_argument(
        "--val-videos", type=positive, help="number of validation videos (default: those of the recipe's list)"
    )
    plan.add_argument(
        "--source",
        default="as-is",
        help=f"how the videos are stored: {', '.join(VIDEO_SOURCES)}; see docs/scale.md (default: %(default)s)",
    )
    plan.add_argument(
        "--decode-ms", type=positive_float, help="milliseconds of one core per clip (default: as measured for --source)"
    )
    plan.add_argument("--video-kb", type=positive_float, help="size of a video in KB (default: that of --source)")


def run_plan(args: argparse.Namespace) -> None:
    from pipelines.planning.plan import format_plan, make_cluster_spec, make_plan

    cluster = make_cluster_spec(
        args.gpus,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        gpu=args.gpu,
        tflops=args.tflops,
        mfu=args.mfu,
        measured=args.measured,
        gpu_node_cores=args.cores,
        decode_node_cores=args.decode_cores,
        decode_nodes=args.decode_nodes,
        gbit=args.gbit,
        memory_gb=args.memory_gb,
        store_share=args.store_share,
    )
    given = {key: getattr(args, key) for key in ("videos", "val_videos", "source", "decode_ms", "video_kb")}
    print(format_plan(make_plan(args.recipe, args.overrides, cluster, **given)))


def add_cost(commands: Commands) -> None:
    cost = add_command(
        commands, "cost", run_cost, "measure a model here: parameters, MACs, memory, latency, throughput"
    )
    cost.add_argument("--model", required=True, help="name of a model, for example s16")
    cost.add_argument("--num-classes", type=int, default=400, help="number of classes (default: %(default)s)")
    cost.add_argument("--frames", type=int, help="frames per clip (default: those of the model)")
    cost.add_argument("--image-size", type=int, help="height and width in pixels (default: those of the model)")
    cost.add_argument(
        "--batch", type=positive, default=4, help="batch size of the throughput measurement (default: %(default)s)"
    )
    cost.add_argument("--json", action="store_true", help="print JSON in place of a table")


def run_cost(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from posmlp.model.cost import cost, format_cost

    sizes = {"frames": args.frames, "image_size": args.image_size}
    overrides = {key: value for key, value in sizes.items() if value is not None}
    measured = cost(args.model, batch=args.batch, num_classes=args.num_classes, **overrides)
    print(json.dumps(asdict(measured), indent=1) if args.json else format_cost(measured))
