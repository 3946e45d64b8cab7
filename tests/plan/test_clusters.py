"""Files of clusters: those that come with the package, and what is told of wrong ones."""

import math
import tomllib
from pathlib import Path

import pytest

from longctx.config import decode, to_toml
from longctx.errors import InputError
from longctx.plan.clusters import ClusterConfig, LinkConfig, RateConfig, load_cluster

FOLDER = Path(__file__).parents[2] / "configs" / "clusters"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
GOOD = (FOLDER / "8xh100.toml").read_text()


def loaded(text: str, tmp_path: Path) -> ClusterConfig:
    """A cluster of that file."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_cluster(str(path))


def test_the_clusters_that_plans_speak_of_are_there():
    assert {"8xh100", "8xh200", "dgx-a100", "h200", "localhost"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_cluster_is_found_by_name_and_says_where_its_numbers_come_from(
    name, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    cluster = load_cluster(name)
    assert cluster == load_cluster(str(FOLDER / f"{name}.toml"))
    assert cluster.name == name
    assert "Assumed" in cluster.source or "Measured" in cluster.source
    assert (FOLDER / f"{name}.toml").read_text().startswith("# ")
    assert decode(ClusterConfig, tomllib.loads(to_toml(cluster))) == cluster


def test_a_rate_lies_between_those_measured_by_logarithms():
    rate = RateConfig((1000, 100000), (4e12, 16e12))
    assert [rate.at(n) for n in (1, 1000, 10000, 100000, 10**9)] == pytest.approx(
        [4e12, 4e12, 8e12, 16e12, 16e12]
    )


def test_a_message_takes_latency_and_bandwidth():
    assert LinkConfig(2e-6, 1e9).seconds(1000) == pytest.approx(3e-6)
    assert LinkConfig(2e-6, math.inf).seconds(1000) == 2e-6


def test_another_precision_is_as_much_slower_as_its_peak_is_lower(tmp_path):
    text = GOOD.replace("bf16 = 989e12", "bf16 = 670e12")
    cluster = loaded(text, tmp_path)
    slow, fast = (cluster.rate("softmax", 16384, name) for name in ("fp32", "bf16"))
    assert (slow, fast) == pytest.approx((60e12, 600e12))


WRONG = {
    "[links.node]\nlatency = 4e-6\nbandwidth = 360e9\n": ("", "links.node is missing"),
    "[links.fabric]\nlatency = 6e-6\nbandwidth = 45e9\n": ("", "links.fabric is missing"),
    "[links.host]\nlatency = 10e-6\nbandwidth = 50e9\n": ("", "links.host is missing"),
    "[rates.delta]\ntokens = [1024, 32768]\nflops = [10e12, 43e12]\n": (
        "",
        "rates.delta is missing",
    ),
    "bandwidth = 45e9": ("bandwidth = 0.0", "links.fabric.bandwidth = 0.0: must be positive"),
    "latency = 6e-6": ("latency = -1.0", "links.fabric.latency = -1.0: must be 0 or positive"),
    "links.fabric": ("links.fabrik", "links.fabrik is not a known name; nearest: fabric"),
    "rates.matmul": ("rates.matmull", "rates.matmull is not a known name; nearest: matmul"),
    "[links.host]": (
        "[links.nvme]\nlatency = 0.0\nbandwidth = 1.0\n\n[links.host]",
        "links.nvme is not a known name",
    ),
    "[rates.sparse]": (
        "[rates.conv]\ntokens = [1]\nflops = [1.0]\n\n[rates.sparse]",
        "rates.conv is not a known name",
    ),
    "tokens = [256, 4096]": ("tokens = [256]", "rates.matmul has 1 tokens and 2 flops"),
    "tokens = [1024, 32768]": ("tokens = [1024, 1024]", "rates.delta.tokens = [1024, 1024]"),
    "flops = [10e12, 43e12]": ("flops = [10e12, 0.0]", "rates.delta.flops = 0.0: must be positive"),
    "fp64 = 34e12": ("fp8 = 34e12", "peak_flops.fp8 is not a known name"),
    "bf16 = 989e12\n": ("", "rates_precision = 'bf16': has no peak_flops"),
    "bf16 = 989e12\nfp32 = 67e12\nfp64 = 34e12": ("", "peak_flops is empty"),
    "processes_per_node = 8": ("processes_per_node = 0", "processes_per_node = 0: must be"),
    "memory_gib = 79.0": ("memory_gib = -1.0", "memory_gib = -1.0: must be positive"),
    "fixed_seconds = 0.05": ("fixed_seconds = -1.0", "fixed_seconds = -1.0: must be 0"),
    "memory_gib = 79.0\n": (
        "memory_gib = 79.0\ncall_seconds = -1.0\n",
        "call_seconds = -1.0: must",
    ),
    'name = "8xh100"': ('name = ""', "name is empty"),
    'device = "cuda"': ('devise = "cuda"', "devise is not a known field"),
}


@pytest.mark.parametrize("right", WRONG, ids=[told for _, told in WRONG.values()])
def test_a_wrong_file_is_told_in_one_line_that_names_it_and_the_field(right, tmp_path):
    wrong, told = WRONG[right]
    assert right in GOOD
    with pytest.raises(InputError) as caught:
        loaded(GOOD.replace(right, wrong, 1), tmp_path)
    message = str(caught.value)
    assert told in message
    assert "mine.toml: " in message
    assert "\n" not in message


def test_a_name_that_nothing_has_is_told_with_those_there_are():
    with pytest.raises(InputError, match=r"nowhere: no such file or cluster .*8xh100"):
        load_cluster("nowhere")


def test_a_precision_without_a_peak_is_told():
    cluster = decode(ClusterConfig, tomllib.loads(GOOD.replace("fp32 = 67e12\nfp64 = 34e12\n", "")))
    with pytest.raises(InputError, match=r"peak_flops\.fp32 is missing.*bf16"):
        cluster.rate("matmul", 1, "fp32")
