"""The launch recipes, with stand-ins for srun, scontrol and gcloud; no cluster is at hand."""

import os
import pathlib
import subprocess
import sys

import pytest
import yaml
from process_pair import CLEAN, ROOT, SGD, finish, free_port

LAUNCH = ROOT / "experiments" / "launch"
JOBSET = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


@pytest.fixture
def programs(tmp_path):
    """`programs(name, script)` puts a program on the path of what is run with the environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    environment = {**CLEAN, "PATH": f"{folder}:{os.environ['PATH']}"}

    def put(name: str, script: str) -> dict[str, str]:
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        return environment

    return put


def sbatch(environment, *arguments, cwd=ROOT, **variables):
    return subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", *arguments], cwd=cwd, capture_output=True, text=True,
        env={**environment, "SLURM_JOB_ID": "7", **variables},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "restarts", "queued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (137, 0, True), (75, 100, False)],
)
def test_what_slurm_queues_again(programs, tmp_path, code, restarts, queued):
    programs("scontrol", f'echo "$@" > {tmp_path}/queued')
    environment = programs("srun", f"exit {code}")
    done = sbatch(environment, "experiments.ddpm", SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == (0 if queued else code)
    assert (tmp_path / "queued").exists() == queued
    assert not queued or (tmp_path / "queued").read_text().split() == ["requeue", "7"]


def test_a_job_that_cannot_be_queued_again_fails(programs):
    programs("scontrol", "exit 1")
    assert sbatch(programs("srun", "exit 75"), "experiments.ddpm").returncode == 75


@pytest.mark.parametrize(
    ("task", "ended", "queued"),
    [(0, 0, False), (1, 143, False), (2, 137, False), (75, 143, True), (134, 137, True)],
)
def test_srun_gives_the_signal_that_it_has_ended_the_others_with(
    programs, tmp_path, task, ended, queued
):
    """As srun does it with --kill-on-bad-exit; an error of one task is an error nevertheless."""
    programs("scontrol", f"touch {tmp_path}/queued")
    programs("python", f'echo "$SRUN_CPUS_PER_TASK" "$@"; exit {task}')
    environment = programs("srun", f'shift\n"$@"\nexit {ended}')
    variables = {"PYTHON": "python", "SLURM_CPUS_PER_TASK": "6"}
    done = sbatch(environment, "experiments.ddpm", "--a=b c", cwd=tmp_path, **variables)
    assert done.stdout.splitlines()[0] == "6 -m experiments.ddpm --a=b c"
    assert done.returncode == (0 if queued else task)
    assert (tmp_path / "queued").exists() == queued
    assert not list(tmp_path.glob("*.errors"))


def test_a_slurm_task_stays_until_its_program_has_saved(programs, tmp_path):
    """SLURM signals all processes of a step, the shell between srun and python too."""
    programs("scontrol", "true")
    programs("python", f"touch {tmp_path}/began; sleep 0.5; exit 75")
    environment = programs(
        "srun",
        f'shift\n"$@" & pid=$!\nuntil [ -e {tmp_path}/began ]; do sleep 0.05; done\n'
        "kill -TERM $pid\nwait $pid",
    )
    done = sbatch(environment, "experiments.ddpm", cwd=tmp_path, PYTHON="python")
    assert "exit code 75: the job is queued again" in done.stdout


@pytest.mark.slow  # two processes train
def test_the_run_of_a_slurm_step(programs, tmp_path):
    """As srun would start it on one node: one process per task, each told its number."""
    job = next(i for i in range(4096) if free(61440 + i))  # the port that jax takes for this job
    environment = programs(
        "srun",
        '[ "$1" = --kill-on-bad-exit=1 ] && shift\n'
        "export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1\n"
        'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done\nwait -n && wait -n',
    )
    done = sbatch(
        environment, "experiments.ddpm", *SGD, f"--workdir={tmp_path}/run",
        SLURM_JOB_ID=str(job), PYTHON=sys.executable, BLOGJAX_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es)" in done.stdout
    assert (tmp_path / "run" / "result.json").exists()


def free(port: int) -> bool:
    import socket

    with socket.socket() as s:
        return s.connect_ex(("localhost", port)) != 0


def container():
    [job] = JOBSET["spec"]["replicatedJobs"]
    [only] = job["template"]["spec"]["template"]["spec"]["containers"]
    return job, only


def test_the_numbers_and_names_of_the_jobset_agree():
    job, only = container()
    spec, name = job["template"]["spec"], JOBSET["metadata"]["name"]
    environment = {e["name"]: e["value"] for e in only["env"]}
    assert int(environment["JAX_NUM_PROCESSES"]) == spec["parallelism"] == spec["completions"]
    host, _, port = environment["JAX_COORDINATOR_ADDRESS"].partition(":")
    # https://jobset.sigs.k8s.io/docs/concepts: pod 0 of job 0, within the set's own subdomain
    assert host == f"{name}-{job['name']}-0-0.{name}"
    assert [p["containerPort"] for p in only["ports"]] == [int(port)]
    [rule] = spec["podFailurePolicy"]["rules"]
    assert (rule["onExitCodes"]["containerName"], rule["action"]) == (only["name"], "FailJob")
    assert rule["onExitCodes"]["values"] == [1, 2]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # what the policy asks for
    mounted = {m["name"] for m in only["volumeMounts"]}
    assert mounted == {v["name"] for v in spec["template"]["spec"]["volumes"]}
    [workdir] = [a for a in only["command"] if a.startswith("--workdir=")]
    assert workdir.startswith("--workdir=" + only["volumeMounts"][0]["mountPath"])


@pytest.mark.slow  # two processes train
def test_the_pods_of_the_jobset(tmp_path):
    """Its command and variables, on two devices, with the folder and the config changed."""
    _, only = container()
    environment = {
        **CLEAN, **{e["name"]: e["value"] for e in only["env"]},
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "BLOGJAX_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    command = [a for a in only["command"] if not a.startswith(("--config", "--workdir"))]
    command = [sys.executable, *command[1:], *SGD, f"--workdir={tmp_path}/run"]
    pods = [
        subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**environment, "JOB_COMPLETION_INDEX": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    (code, out), (other, quiet) = finish(*pods)
    assert (code, other) == (0, 0), out + quiet
    assert "2 process(es)" in out
    assert (tmp_path / "run" / "result.json").exists()


def test_what_gcloud_is_asked_to_run_on_all_hosts(programs, tmp_path):
    """The stand-in runs it, with a python that repeats its arguments."""
    host = tmp_path / "host"
    (host / "blogjax" / ".venv" / "bin").mkdir(parents=True)
    python = host / "blogjax" / ".venv" / "bin" / "python"
    python.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"")
    python.chmod(0o755)
    pip = python.with_name("pip")
    pip.write_text(f'#!/usr/bin/env bash\necho "$@" > {tmp_path}/installed')
    pip.chmod(0o755)
    programs("git", f'echo "$@" >> {tmp_path}/git')
    environment = programs(
        "gcloud",
        f'echo "${{@:1:7}}" >> {tmp_path}/asked\ncd {host} && bash -c "${{8#--command=}}"',
    )
    script = [LAUNCH / "tpu_pod.sh", "experiments.ddpm", "--config=a.py:b", "--workdir=/a b/$c"]
    names = {"TPU": "pod", "ZONE": "here", "REPOSITORY": "https://host/x y.git"}
    done = subprocess.run(
        script, env=environment | names, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["-m", "experiments.ddpm", "--config=a.py:b", script[-1]]
    assert (tmp_path / "asked").read_text().splitlines() == [
        "compute tpus tpu-vm ssh pod --zone=here --worker=all"
    ] * 2
    assert (tmp_path / "git").read_text().splitlines() == [
        "fetch -q origin main", "checkout -q --detach FETCH_HEAD"
    ]  # fmt: skip
    assert (tmp_path / "installed").read_text().split() == [
        "install", "-q", "-c", "requirements.txt", ".[train,tpu]"
    ]  # fmt: skip
    pip.chmod(0o644)  # an environment half made: it is made anew, by a Python that is new enough
    old = programs("old", 'case "$2" in *version_info*) echo too old >&2; exit 1;; esac; exit 9')
    refused = subprocess.run(
        script, env=old | names | {"PYTHON": "old"}, capture_output=True, text=True
    )
    assert refused.returncode == 1 and "too old" in refused.stderr
    for missing in names:
        left = {k: v for k, v in names.items() if k != missing}
        refused = subprocess.run(script, env=environment | left, capture_output=True, text=True)
        assert refused.returncode != 0 and missing in refused.stderr
    refused = subprocess.run(script[:1], env=environment | names, capture_output=True, text=True)
    assert refused.returncode == 2 and "usage" in refused.stderr


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")) + [LAUNCH / "slurm.sbatch"])
def test_the_scripts_can_be_run_and_parsed(path: pathlib.Path):
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
