"""Questions from rank 0 to all ranks, answered within a timeout: a rank that is dead, stopped or stuck gets named.

Questions and answers go through a key-value store that rank 0 or torchrun serves, not through collectives: when a
collective hangs, nobody can tell which rank is missing. A measurement runs in a thread of its own, so that a rank whose
collective, driver or file system hangs can still report that.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from tostlm.doctor.findings import Finding, format_ranks, unhealthy
from tostlm.errors import EXIT_USER_ERROR, UserError, error_summary
from tostlm.launch import RankInfo

Value = TypeVar("Value")
Measurement = Callable[[], object]  # its value must be something that JSON holds

END = "end"
GRACE_SECONDS = 5.0  # for an answer to travel
POLL_SECONDS = 0.02
REPORTED_ERRORS = (UserError, OSError, RuntimeError, MemoryError)  # become findings; any other error is a bug


class Answer(NamedTuple):
    """What a rank measured, as JSON holds it, or why it could not."""

    value: Any
    error: str = ""


class MeasurementError(Exception):
    """A measurement failed, or was not done in time."""


class DoctorAborted(Exception):
    """Ranks did not answer, or could not measure, so that no more checks can be made; the finding names them."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding


class Coordinator:
    """One rank's connection to all others, which answer within `timeout_seconds`.

    Attributes:
        hosts: the host of each rank; "" for one that has not arrived.

    Raises:
        UserError: rank 0 cannot be reached.
    """

    def __init__(self, rank_info: RankInfo, timeout_seconds: float) -> None:
        self.rank_info, self.timeout_seconds = rank_info, timeout_seconds
        self.hosts = [""] * rank_info.world_size
        self._worker = self._new_worker()
        self._asked, self._timed_out = 0, set[int]()
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            self._store = self._run_with_timeout(timeout_seconds, self._connect)
        except MeasurementError as error:
            if rank_info.rank == 0:
                raise UserError(f"rank 0 cannot listen at {address} ({error}); choose another port") from None
            raise _rank_0_unreachable(rank_info, f"at {address}") from None

    def _connect(self) -> Store:
        served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(  # type: ignore[attr-defined, unused-ignore]  # torch does not list it
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=self.rank_info.rank == 0 and not served_by_torchrun,
            timeout=timedelta(seconds=3 * self.timeout_seconds),
            wait_for_workers=False,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"doctor/{attempt}", store)

    def gather_hosts(self) -> None:
        """On rank 0: learn the hosts of all ranks.

        Raises:
            DoctorAborted: some ranks did not arrive.
        """
        self._store.set("here/0", _host_name())
        missing = self._wait_for_ranks("here", time.monotonic() + self.timeout_seconds)
        for rank in set(range(self.rank_info.world_size)) - set(missing):
            self.hosts[rank] = self._store.get(f"here/{rank}").decode()
        self._store.set("hosts", json.dumps(self.hosts))
        if missing:
            ranks = f"rank(s) {', '.join(map(str, missing))} of {self.rank_info.world_size}"
            measured = f"{ranks} did not arrive within {self.timeout_seconds:g} s"
            remedy = "check that they started and can reach rank 0's address, or exclude their hosts"
            raise DoctorAborted(Finding("ranks", "FAIL", measured, remedy, tuple(missing)))

    def ask(self, question: str, measurement: Measurement, decode: Callable[[Any], Value]) -> list[Value]:
        """On rank 0: return what each rank measured, all at the same time.

        Args:
            question: the name of the measurement on the other ranks.
            measurement: rank 0's own.
            decode: makes what was measured of what JSON holds.

        Raises:
            DoctorAborted: some ranks did not answer, or could not measure.
        """
        self._asked += 1
        deadline = time.monotonic() + self.timeout_seconds + GRACE_SECONDS
        self._store.set(f"question/{self._asked}", question)
        self._answer(measurement)
        if missing := self._wait_for_ranks(f"answer/{self._asked}", deadline):
            reason = f"no answer within {self.timeout_seconds:g} s"
            raise DoctorAborted(unhealthy(question, missing, self.hosts, reason))
        texts = [self._store.get(f"answer/{self._asked}/{rank}") for rank in range(self.rank_info.world_size)]
        answers = [Answer(*json.loads(text)) for text in texts]
        failed = [rank for rank, answer in enumerate(answers) if answer.error]
        if not failed:
            return [decode(answer.value) for answer in answers]
        reason = answers[failed[0]].error
        if len(failed) < len(answers):
            raise DoctorAborted(unhealthy(question, failed, self.hosts, reason))
        remedy = "check that all hosts reach each other by the network interface that they use"
        raise DoctorAborted(Finding(question, "FAIL", f"{format_ranks(failed, self.hosts)}: {reason}", remedy))

    def end(self) -> None:
        """On rank 0: end the session, and wait until the other ranks have read that: the store may be rank 0's own."""
        self._asked += 1
        self._store.set(f"question/{self._asked}", END)
        self._answer(_acknowledge)
        self._wait_for_ranks(f"answer/{self._asked}", time.monotonic() + GRACE_SECONDS)

    def serve(self, measurements: Mapping[str, Measurement]) -> None:
        """On every other rank: answer rank 0's questions until it ends the session.

        Raises:
            UserError: rank 0 does not answer; only rank 1 reports it.
        """
        self._store.set(f"here/{self.rank_info.rank}", _host_name())
        self.hosts = json.loads(self._read("hosts"))
        question = ""
        while question != END:
            self._asked += 1
            question = self._read(f"question/{self._asked}").decode()
            self._answer(_acknowledge if question == END else measurements[question])

    def _read(self, key: str) -> bytes:
        """Return a value that rank 0 sets, which may take as long as rank 0 waits for other ranks."""
        try:
            return self._run_with_timeout(2 * self.timeout_seconds + GRACE_SECONDS, lambda: self._store.get(key))
        except MeasurementError:
            raise _rank_0_unreachable(self.rank_info, f"from {_host_name()}") from None

    def _answer(self, measurement: Measurement) -> None:
        try:
            answer = Answer(self._run_with_timeout(self.timeout_seconds, measurement))
        except MeasurementError as error:
            answer = Answer(None, str(error))
        self._store.set(f"answer/{self._asked}/{self.rank_info.rank}", json.dumps(answer))

    def _wait_for_ranks(self, prefix: str, deadline: float) -> list[int]:
        """Return the ranks whose keys are missing at the deadline. Ranks that timed out before are not waited for."""
        keys = {rank: f"{prefix}/{rank}" for rank in range(self.rank_info.world_size) if rank not in self._timed_out}
        while not self._store.check(list(keys.values())):
            if time.monotonic() > deadline:
                self._timed_out = {rank for rank, key in keys.items() if not self._store.check([key])}
                return sorted(self._timed_out)
            time.sleep(POLL_SECONDS)
        return []

    def _run_with_timeout(self, seconds: float, work: Callable[[], Value]) -> Value:
        future = self._worker.submit(work)
        wait([future], seconds)
        if not future.done():
            self._worker = self._new_worker()  # the old one may hang for ever
            raise MeasurementError(f"not done within {seconds:g} s")
        try:
            return future.result()
        except REPORTED_ERRORS as error:
            raise MeasurementError(error_summary(error)) from None

    def _new_worker(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "answer", _choose_device, (self.rank_info.local_rank,))

    @property
    def first_of_host(self) -> bool:
        """Whether this rank is the lowest of its host, which measures what concerns the whole host."""
        return self.hosts.index(self.hosts[self.rank_info.rank]) == self.rank_info.rank

    def connect_group(self) -> None:
        """Join torch.distributed's process group as a run does: NCCL between GPUs, gloo between CPUs.

        The group gets a connection to the store of its own: a hanging call on a shared one would block the answers.
        """
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("group", self._store.clone()),  # type: ignore[attr-defined]  # missing in torch's stubs
            rank=self.rank_info.rank,
            world_size=self.rank_info.world_size,
            timeout=timedelta(seconds=3 * self.timeout_seconds),  # longer than ours, which reports the rank at fault
        )


def _rank_0_unreachable(rank_info: RankInfo, where: str) -> BaseException:
    if rank_info.rank > 1:  # rank 1 reports it for all
        return SystemExit(EXIT_USER_ERROR)
    return UserError(f"rank 0 does not answer {where}; check that it runs and that its port can be reached")


def _acknowledge() -> None:
    """Measure nothing: the answer shows that the end of the session was read."""


def _host_name() -> str:
    """Return this host's name as Slurm knows it, or else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _choose_device(local_rank: int) -> None:
    if torch.cuda.is_available():  # a launcher may show each rank only its own GPU
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
