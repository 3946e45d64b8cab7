"""What an exchange costs a process besides its message, from steps that all processes take."""

import time
from dataclasses import replace
from statistics import median

import torch

from longctx.doctor.measure import MEMORY, MOST_WEIGHTS, VOCABULARY, Bench, synchronize
from longctx.errors import InputError
from longctx.parallel import ParallelConfig
from longctx.parallel.engine import Engine
from longctx.parallel.mesh import Mesh
from longctx.plan.clusters import ClusterConfig
from longctx.plan.costs import step_time
from longctx.plan.sizes import parameters_of
from longctx.plan.traffic import traffic_of
from longctx.plan.workload import Workload, workload
from longctx.train.engines import build_engine
from longctx.train.settings import Settings, TrainConfig

STEPS, SETTLING = 10, 3
RATE = 1e-3


def seconds_of_a_call(
    bench: Bench, cluster: ClusterConfig, processes: int, timeout_seconds: int
) -> float:
    """What a step of all processes on one sequence takes beyond what the cost model knows of it,
    for each exchange. Every process calls it; 0 if the model is too large."""
    tokens = bench.shortest
    parameters = parameters_of(bench.model, VOCABULARY).total
    if not tokens or parameters > MOST_WEIGHTS[bench.device.type]:
        return 0.0
    work = _work(bench, tokens, processes)
    mesh = Mesh(work.split, bench.device, timeout_seconds)
    engine = build_engine(work.settings, VOCABULARY, mesh)
    seconds = [_step(bench, work, mesh, engine) for _ in range(STEPS)][SETTLING:]
    calls = sum(each.calls for each in traffic_of(work, 0).values())
    return max(0.0, median(seconds) - step_time(work, cluster).total) / calls


def _work(bench: Bench, tokens: int, processes: int) -> Workload:
    """One sequence for all, or where layers refuse that, one for each."""
    train = TrainConfig(seq_len=tokens * processes, batch_size=1, precision=bench.precision)
    settings = Settings(model=bench.model, train=train, memory=MEMORY)
    settings = replace(settings, parallel=replace(settings.parallel, sp=processes))
    try:
        return workload(settings, processes, VOCABULARY, bench.precision)
    except InputError:
        train = replace(train, seq_len=tokens, batch_size=processes)
        settings = replace(settings, train=train, parallel=ParallelConfig())
        return workload(settings, processes, VOCABULARY, bench.precision)


def _step(bench: Bench, work: Workload, mesh: Mesh, engine: Engine) -> float:
    """Seconds of forward and backward pass, the norm of gradients and the update."""
    seq_len, own = work.settings.train.seq_len, work.placement.lengths[mesh.sp_rank]
    ids_BT = torch.randint(VOCABULARY, (1, own), device=bench.device)
    view = mesh.view(((0,),), seq_len).keyed(0, 0, (mesh.dp_rank,))
    start = time.perf_counter()
    with bench.autocast():
        losses = engine.model(ids_BT, ids_BT, view)
    terms = [losses.cross_entropy / work.tokens_per_step, *losses.mixers.values()]
    engine.backward(torch.stack(terms).sum())
    engine.gradient_norm()
    engine.update(RATE)
    synchronize(bench.device)
    return time.perf_counter() - start
