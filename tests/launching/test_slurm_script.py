"""The batch script, without a Slurm; tests/cluster submits it to one."""

import pytest

from m3i_scale.errors import ConfigError
from m3i_scale.launch.description import Cluster
from m3i_scale.launch_command import read_job, render


def script(**fields: object) -> str:
    cluster = Cluster.model_validate({"nodes": 2, "ranks_per_node": 2, **fields})
    (file,) = render("slurm", read_job("m3i", ["output_dir=/data/runs/first"], cluster)[1]).files
    return file.text


def test_a_line_break_in_the_output_dir_of_a_config_file_does_not_start_a_command(tmp_path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text('extends: m3i\noutput_dir: "/data/x\\ntouch /data/y"\n')
    with pytest.raises(ConfigError, match="output_dir"):
        read_job(str(run_file), [], Cluster(nodes=2, ranks_per_node=2))


def test_a_notice_of_ones_own_stands_behind_the_usual_one():
    lines = [line for line in script(sbatch=["--signal=USR2@600"]).splitlines() if "#SBATCH --signal" in line]
    assert lines == ["#SBATCH --signal=USR2@120", "#SBATCH --signal=USR2@600"]


def test_cpus_of_a_rank_are_asked_for_twice():
    text = script(cpus_per_rank=7)
    assert "#SBATCH --cpus-per-task=7\n" in text
    assert "srun" in text.split("--cpus-per-task=7 ")[0]
    assert text.count("--cpus-per-task=7") == 2


def test_without_requeue_nothing_starts_a_job_again():
    text = script(requeue=False)
    assert "#SBATCH --no-requeue\n" in text
    assert "scontrol requeue" not in text.split("srun")[-1]
