"""Submission: errors before anything is queued, what a submission saves, and jobs other than training."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, Run, fail, succeed, tostlm
from tests.data.preparation.test_prepare import content
from tests.slurm.conftest import ClusterJob
from tests.study.common import write_study
from tostlm.checkpoint import checkpoints
from tostlm.cli.app import parse_arguments
from tostlm.data import Tokenizer
from tostlm.errors import UserError
from tostlm.files import locked, write_atomically
from tostlm.launch.environment import first_node
from tostlm.slurm import TASK_COMMANDS, Resources, submit_task
from tostlm.slurm.history import SITE, JobHistory

pytestmark = pytest.mark.timed


def script(run: Run, *arguments: str) -> str:
    return succeed(tostlm("submit", "pretrain", str(run.file), *arguments, "--dry-run"))


def test_a_dry_run_prints_a_script_and_writes_nothing(run: Run) -> None:
    hardware = ["--nodes", "2", "--gpus-per-node", "4", "--cpus-per-rank", "6", "--time", "12:00:00"]
    more = ["--account", "us", "--sbatch", "constraint=h100", "--doctor"]
    text = script(run, "train.batch_tokens=1024", *hardware, *more)
    for option in (
        *("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=6", "time=12:00:00", "account=us"),
        *("constraint=h100", "signal=B:USR1@120", "requeue", "open-mode=append"),
    ):
        assert f"\n#SBATCH --{option}\n" in text
    assert text.splitlines()[-1] == f"exec tostlm submit job {run.dir}/slurm/config.yaml --doctor"
    assert not run.dir.exists()


def test_a_range_of_nodes_has_no_tasks_option(run: Run) -> None:
    """With tasks Slurm would take the fewest nodes that hold the tasks of MIN nodes."""
    text = script(run, "--nodes", "1-2", "--ranks-per-node", "2", "--cpus-per-rank", "3")
    assert "ntasks" not in text and "#SBATCH --mincpus=6\n" in text
    assert "export SLURM_CPUS_PER_TASK=3\n" in text and text.rstrip().endswith(" --ranks-per-node 2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "3"], ["train.batch_tokens 512 does not divide into 3 ranks"]),
        (["--nodes", "2-3"], ["into 3 ranks"]),
        (["--nodes", "2", "--gpus-per-node", "3"], ["into 6 ranks"]),
        (
            ["--nodes", "2", "train.context_parallel_size=4"],
            ["2 ranks do not form whole groups of train.context_parallel_size 4"],
        ),
        (["--nodes", "x"], ["--nodes x must be a number, or the fewest and the most"]),
        (["--nodes", "4-2"], ["--nodes 4-2 must be"]),
        (["data.path=nowhere"], ["nowhere holds no prepared data"]),
        (["train.eval_contexts=[50000]"], ["train.eval_contexts: no held-out document", "longer than 50000 tokens"]),
        (["model.widht=3"], ["model.widht"]),
        (["--chain", "2", "--until-done"], ["give one"]),
        (["--sweep", "seed"], ["--sweep seed must be a key and its values"]),
        (["--sweep", "seed=1,2", "--chain", "2"], ["--sweep makes one array"]),
        (["--sweep", "seed=1,2,1"], ["--sweep seed=1,2,1 makes the same run twice: seed=1; name every"]),
        (["--sweep", "optimizer.lr=1e-2,0.01"], ["makes the same run twice: optimizer.lr=1e-2 and optimizer.lr=0.01"]),
        (["--sweep", "seed=1,2", "--sweep", "seed=3"], ["--sweep seed=1,2 seed=3 makes the same run twice"]),
        (["--sweep", "run_dir=a,b"], ["--sweep run_dir: each run of a sweep gets a folder of its own"]),
        (["--dry-run", "--time", "abc"], ["--time abc must be minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS"]),
        (["--dry-run", "--sbatch", "--foo"], ["--sbatch --foo must be NAME or NAME=VALUE"]),
        (["--dry-run", "--sbatch", "output=x"], ["--sbatch output=x: tostlm sets output itself"]),
        (["--dry-run", "--sbatch", "comment=a\nb"], ["has control characters"]),
        (["--dry-run", "run_dir=a\\b"], ["has a backslash, which Slurm does not take"]),
        (["--dry-run", "deepspeed.zero_optimization.stage=7"], ["stage=7 must be 0, 1, 2 or 3"]),
        (["--site", "nowhere.env"], ["--site nowhere.env does not exist", "tostlm submit site-template"]),
    ],
)
def test_errors_in_the_config_and_options(run: Run, arguments: list[str], words: list[str]) -> None:
    fail(tostlm("submit", "pretrain", str(run.file), *arguments), *words)
    assert not run.dir.exists()


def test_the_site_template_is_the_shipped_file() -> None:
    assert succeed(tostlm("submit", "site-template")) == (ROOT / "slurm" / "site.env").read_text()


def test_a_model_larger_than_gpu_memory_is_refused(run: Run) -> None:
    command = ["submit", "pretrain", str(run.file), "--nodes", "2"]
    fail(tostlm(*command, TOSTLM_GPU_MEMORY_GIB="0.0001"), "the run takes", "per rank on 2 ranks", "no ZeRO stage")
    fail(tostlm(*command, TOSTLM_GPU_MEMORY_GIB="lots"), "TOSTLM_GPU_MEMORY_GIB=lots must be a number")
    site = run.file.with_name("site.env")
    site.write_text("echo output of a module\nexport TOSTLM_GPU_MEMORY_GIB=0.0002\n")
    fail(tostlm(*command, "--site", str(site)), "above TOSTLM_GPU_MEMORY_GIB=0.0002")
    site.write_text("echo no such module >&2\nexit 3\n")
    fail(tostlm(*command, "--site", str(site)), "site.env ends bash with code 3 (no such module)")


def test_errors_without_slurm(run: Run, tmp_path: Path) -> None:
    path = f"{tmp_path}:/usr/bin:/bin"
    if any((Path(folder) / "sbatch").exists() for folder in path.split(":")):  # then hide Slurm
        for name in ("bash", "env", "git"):
            (tmp_path / name).symlink_to(f"/usr/bin/{name}")
        path = str(tmp_path)
    command = ["submit", "pretrain", str(run.file)]
    fail(tostlm(*command, PATH=path), "is not on this machine", "login node")
    fail(tostlm("submit", "job", str(run.file)), "this is not a Slurm job")
    fail(tostlm("submit", "status", str(run.dir) + "2"), "has had no job")


def test_a_run_folder_that_cannot_be_written(run: Run) -> None:
    command = ["submit", "pretrain", str(run.file), "run_dir=/proc/nowhere"]
    fail(tostlm(*command), "cannot write in /proc/nowhere")


def test_slurm_errors_are_one_line_and_queue_nothing(job: ClusterJob) -> None:
    for arguments, word in (
        (["--partition", "nope"], "Invalid partition name specified"),
        (["--time", "99-0"], "Requested time limit is invalid"),
        (["--nodes", "4"], "Node count specification invalid"),
        (["--nodes", "2", "--gpus-per-node", "4"], "Requested node configuration is not available"),
    ):
        result = job.command("submit", "pretrain", str(job.run.file), "train.batch_tokens=1024", *arguments)
        fail(result, "Slurm refuses: ", word)
    assert job.gone()
    assert not job.events()


def test_options_that_sbatch_does_not_have(job: ClusterJob) -> None:
    result = job.command("submit", "pretrain", str(job.run.file), "--dry-run", "--sbatch", "constrain=h100")
    fail(result, "--sbatch constrain=h100: sbatch has no option constrain; the nearest is constraint")


def test_a_run_is_submitted_once_and_its_inputs_are_saved(job: ClusterJob) -> None:
    job.cluster.ask("sbatch", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 100")
    printed = job.submit("train.steps=7", "--nodes", "2")
    assert f"tostlm submit status {job.run.dir}" in printed
    again = job.command("submit", "pretrain", str(job.run.file), "--nodes", "2")
    fail(again, f"is queued or running as job {job.id} (PENDING)", "tostlm submit cancel")
    with locked(job.folder / ".lock", ""):
        fail(job.command("submit", "pretrain", str(job.run.file)), "is being submitted by another tostlm submit")
    assert yaml.safe_load((job.folder / "config.yaml").read_text())["train"]["steps"] == 7
    code = (job.folder / "code.txt").read_text()
    assert code.startswith("tostlm 0.1.0 in ") and "\ntorch==" in code
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        assert head.stdout.strip() in code
    assert (job.folder / "pretrain.sbatch").read_text().splitlines()[-1].startswith("exec tostlm submit job ")
    printed = succeed(job.command("submit", "status", str(job.run.dir)))
    assert f"job         {job.id} pending" in printed and "step        none yet" in printed
    assert succeed(job.command("submit", "cancel", str(job.run.dir))) == f"job {job.id} is cancelled\n"
    fail(job.command("submit", "cancel", str(job.run.dir)), "has no queued or running job")


def test_a_run_that_trains_without_slurm_is_not_submitted(job: ClusterJob) -> None:
    local = job.run.start("train.steps=100000")
    job.wait_for(lambda: job.steps() > 0)
    command = ["submit", "pretrain", str(job.run.file), "train.steps=100000"]
    fail(job.command(*command), "is in use by another tostlm train")
    local.send_signal(signal.SIGTERM)
    local.end()
    assert not job.events()


def test_a_sweep_is_an_array_of_runs(job: ClusterJob) -> None:
    job.run.dir = job.run.dir.with_name("a #sweep of 'two' %j 50% $(x) ä")  # a name that Slurm and shells would change
    printed = job.submit("train.steps=3", f"run_dir={job.run.dir}", "--sweep", "optimizer.lr=1e-2,3e-3")
    assert "an array of 2 runs" in printed
    job.wait_for(job.gone)
    runs = [job.run.dir / name for name in ("optimizer.lr=1e-2", "optimizer.lr=3e-3")]
    rates = []
    for run in runs:
        assert checkpoints(run)[-1].name == "step-00000003", job.details()
        rates.append(yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"])
    assert rates == [1e-2, 3e-3]
    printed = succeed(job.command("submit", "status", str(job.run.dir)))
    assert printed.count("has finished its run") == 2
    fail(job.command("submit", "cancel", str(job.run.dir)), "has no queued or running job")


def test_a_finished_run_is_not_queued(trained: dict[str, Run]) -> None:
    printed = succeed(tostlm("submit", "pretrain", str(trained["tssa"].file)))
    assert "finished at step 6; raise train.steps to train further" in printed


def test_prepare_jobs_make_the_same_data_as_one_process(
    job: ClusterJob, speeches: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches))
    options = ["--source", "text.jsonl", "--tokenizer", "t.model", "--unit-bytes", "50000"]
    succeed(tostlm("prepare", *options, "--out", "whole", cwd=tmp_path))
    command = ["submit", "prepare", *options, "--out", "out", "--nodes", "3"]
    printed = succeed(job.command(*command)).splitlines()
    assert len(printed) == 2 and "when job" in printed[1]
    folder = tmp_path / "out-jobs" / "slurm" / "prepare" / "logs"
    job.wait_for(job.gone)
    logs = "\n".join(path.read_text() for path in folder.iterdir())
    assert (tmp_path / "out" / "manifest.json").exists(), logs
    assert content(tmp_path / "out") == content(tmp_path / "whole"), logs


def plan_task(kind: str, *arguments: str) -> str:
    """What `tostlm submit KIND ARGUMENTS --dry-run` prints."""
    parsed = parse_arguments(TASK_COMMANDS[kind], list(arguments))
    return submit_task(kind, arguments, parsed, Resources(), site=None, dry_run=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prepare --tokenizer t --out o", "prepare needs --source and --tokenizer"),
        ("prepare --source s --out o", "prepare needs --source and --tokenizer"),
        ("prepare --source s --tokenizer=none --out=o", "--tokenizer none does not exist"),
        ("prepare --source s --tokenizer t --out o --task 1/2", "leave --task and --merge out"),
        ("prepare --out o --merge", "leave --task and --merge out"),
        ("eval nowhere", "nowhere"),
        ("bench nowhere.yaml", "nowhere.yaml"),
        ("study nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_tasks_that_would_fail_are_not_submitted(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_task(*arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        *("prepare --source s --tokenizer t", "eval nowhere --windows none", "bench --repeats=1", "convert nowhere"),
        *("bench --repeets=1 gpt2-base", "study --workers 2", "study --worker 2 mixers"),
    ],
)
def test_arguments_that_a_task_does_not_take_are_not_submitted(arguments: str) -> None:
    with pytest.raises(Exception) as refused:
        plan_task(*arguments.split())
    assert refused.value.exit_code == 2  # as of the subcommand itself


def test_options_may_stand_before_what_a_task_reads(run: Run, tmp_path: Path) -> None:
    file = write_study(run, search=None)
    assert f"tostlm study --workers 2 {file}" in plan_task("study", "--workers", "2", str(file))
    result = tostlm("submit", "study", "--worker", "2", str(file), "--dry-run", cwd=tmp_path)
    assert result.returncode == 2 and "Usage: tostlm study" in result.stderr and "--worker" in result.stderr


def test_eval_bench_and_convert_jobs(job: ClusterJob, trained: dict[str, Run]) -> None:
    run = trained["tssa"]
    tasks = {
        "eval": [str(run.dir), "--contexts", "16,32", "--windows", "2"],
        "bench": [str(run.file), "--contexts", "16", "--tokens", "64", "--repeats", "1"],
        "convert": [str(run.dir), "--to", "hf", str(run.dir / "hf")],
    }
    training = JobHistory(run.dir)
    write_atomically(training.folder / SITE, "export OF=training\n")  # that a queued job will source
    for kind, arguments in tasks.items():
        assert "its log is" in succeed(job.command("submit", kind, *arguments, "--gpus-per-node", "0"))
    by_hand = ["sbatch", "--output=/dev/null", f"--chdir={ROOT}", str(ROOT / "slurm" / "eval.sbatch"), *tasks["eval"]]
    job.cluster.ask(*by_hand, "--out", str(run.dir / "by-hand"))
    job.wait_for(job.gone)
    assert (run.dir / "by-hand" / "perplexity.json").exists()
    logs = "\n".join(path.read_text() for path in (run.dir / "slurm").glob("*/logs/*"))
    assert (training.folder / SITE).read_text() == "export OF=training\n"
    assert not training.jobs()  # the run itself has none, and may be submitted
    assert (run.dir / "perplexity.json").exists(), logs
    assert (run.dir / "hf" / "config.json").exists(), logs
    assert "tokens/s" in logs


@pytest.mark.slow
def test_the_tasks_of_an_array_divide_a_study(job: ClusterJob) -> None:
    file = write_study(job.run, search=None)
    assert "_N.log" in succeed(job.command("submit", "study", str(file), "--nodes", "2"))
    job.wait_for(job.gone)
    folder = job.run.dir.parent / "study"
    logs = [path.read_text() for path in (folder / "slurm/study/logs").iterdir()]
    assert len(json.loads((folder / "report.json").read_text())["final"]) == 4, "\n".join(logs)
    names = ["softmax/seed0", "softmax/seed1", "cross/seed0", "cross/seed1"]
    ran = [{name for name in names if f"== {name}, learning rate" in log} for log in logs]
    assert len(ran) == 2 and all(ran), ran
    assert not ran[0] & ran[1]


def test_first_node_agrees_with_scontrol(job: ClusterJob) -> None:
    for names in ("node[1-2]", "node2", "gpu[07-09,12],node1", "a,b[1-2]", "n[3,1-2]", "r1n[001-128]"):
        assert first_node(names) == job.cluster.ask("scontrol", "show", "hostnames", names).splitlines()[0]
