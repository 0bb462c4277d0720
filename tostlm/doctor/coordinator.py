"""Questions from rank 0 to all ranks, answered within a timeout: a rank that is dead, stopped or stuck gets named.

Questions and answers go through a key-value store that rank 0 or torchrun serves, not through collectives: when a
collective hangs, nobody can tell which rank is missing. A measurement runs in a thread of its own, so that a rank whose
collective, driver or file system hangs can still report that.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from tostlm.config import RunConfig
from tostlm.doctor.findings import Finding, format_ranks, unhealthy, unique
from tostlm.errors import EXIT_USER_ERROR, UserError, error_summary
from tostlm.launch import RankInfo

Value = TypeVar("Value")
Measure = Callable[[RunConfig, RankInfo], Value]  # a module's function, or a partial of one: pickles hold its name

GRACE_SECONDS = 5.0  # for an answer to travel
POLL_SECONDS = 0.02
REPORTED_ERRORS = (UserError, OSError, RuntimeError, MemoryError)  # become findings; any other error is a bug


class MeasurementError(Exception):
    """A measurement failed, or was not done in time."""


class DoctorAborted(Exception):
    """Ranks did not answer, or could not measure, so that no more checks can be made; the finding names them."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding


class Coordinator:
    """One rank's connection to all others, which answer within `timeout_seconds`.

    Attributes:
        hosts: on rank 0, the host of each rank; "" for one that has not arrived.

    Raises:
        UserError: rank 0 cannot be reached.
    """

    def __init__(self, config: RunConfig, rank_info: RankInfo, timeout_seconds: float) -> None:
        self.rank_info, self.timeout_seconds = rank_info, timeout_seconds
        self.hosts = [""] * rank_info.world_size
        self._config = config
        self._asked = 0
        self._answering = list(range(rank_info.world_size))  # ranks that have answered all questions in time
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        serve = rank_info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            self._store = self._run_with_timeout(timeout_seconds, partial(_connect, timeout_seconds, serve))
        except MeasurementError as error:
            if rank_info.rank == 0:
                raise UserError(f"rank 0 cannot listen at {address} ({error}); choose another port") from None
            raise _rank_0_unreachable(rank_info, f"at {address}") from None

    def gather_hosts(self) -> None:
        """On rank 0: learn the hosts of all ranks.

        Raises:
            DoctorAborted: some ranks did not arrive.
        """
        for rank, host in self._gather(_host_name).items():
            self.hosts[rank] = "" if isinstance(host, MeasurementError) else host
        if missing := [rank for rank, host in enumerate(self.hosts) if not host]:
            ranks = f"rank(s) {', '.join(map(str, missing))} of {self.rank_info.world_size}"
            measured = f"{ranks} did not arrive within {self.timeout_seconds:g} s"
            remedy = "check that they started and can reach rank 0's address, or exclude their hosts"
            raise DoctorAborted(Finding("ranks", "FAIL", measured, remedy, tuple(missing)))

    def ask(self, question: str, measure: Measure[Value]) -> list[Value]:
        """On rank 0: return what each rank measures, all at the same time. Findings call it `question`.

        Raises:
            DoctorAborted: some ranks did not answer, or could not measure.
        """
        answers = self._gather(measure)
        if missing := sorted(set(range(self.rank_info.world_size)) - answers.keys()):
            reason = f"no answer within {self.timeout_seconds:g} s"
            raise DoctorAborted(unhealthy(question, missing, self.hosts, reason))
        failed = [rank for rank, answer in answers.items() if isinstance(answer, MeasurementError)]
        if not failed:
            return list(answers.values())
        reason = str(answers[failed[0]])
        if len(failed) < len(answers):
            raise DoctorAborted(unhealthy(question, failed, self.hosts, reason))
        remedy = "check that all hosts reach each other by the network interface that they use"
        raise DoctorAborted(Finding(question, "FAIL", f"{format_ranks(failed, self.hosts)}: {reason}", remedy))

    def ask_hosts(self, question: str, measure: Measure[Value]) -> dict[int, Value]:
        """On rank 0: return what the first rank of each host measures, by rank; as `ask` otherwise."""
        first_ranks = [self.hosts.index(host) for host in unique(self.hosts)]
        answers = self.ask(question, partial(_measure_on, first_ranks, measure))
        return {rank: answer for rank, answer in enumerate(answers) if answer is not None}

    def end(self) -> None:
        """On rank 0: end the session, and wait until the other ranks have read that: the store may be rank 0's own."""
        self._gather(_end_session, GRACE_SECONDS)

    def serve(self) -> None:
        """On every other rank: answer rank 0's questions until it ends the session.

        Raises:
            UserError: rank 0 does not answer; only rank 1 reports it.
        """
        patience = 2 * self.timeout_seconds + GRACE_SECONDS  # rank 0 may be waiting for other ranks
        measure: Any = None
        while measure is not _end_session:
            self._asked += 1
            try:
                question = self._run_with_timeout(patience, partial(self._store.get, f"question/{self._asked}"))
            except MeasurementError:
                raise _rank_0_unreachable(self.rank_info, f"from {_host_name()}") from None
            measure = pickle.loads(question)
            self._answer(measure)

    def _gather(self, measure: Measure[object], seconds: float | None = None) -> dict[int, Any]:
        """Return what each rank measures, or its MeasurementError, by rank, for those that answer within `seconds`.

        By default that is the timeout. Ranks that did not answer an earlier question are not waited for.
        """
        deadline = time.monotonic() + (seconds or self.timeout_seconds + GRACE_SECONDS)
        self._asked += 1
        self._store.set(f"question/{self._asked}", pickle.dumps(measure))  # type: ignore[arg-type]  # bytes work too
        self._answer(measure)
        keys = {rank: f"answer/{self._asked}/{rank}" for rank in self._answering}
        while not self._store.check(list(keys.values())):
            if time.monotonic() > deadline:
                self._answering = [rank for rank, key in keys.items() if self._store.check([key])]
                break
            time.sleep(POLL_SECONDS)
        return {rank: pickle.loads(self._store.get(keys[rank])) for rank in self._answering}

    def _answer(self, measure: Measure[object]) -> None:
        answer: object
        try:
            answer = self._run_with_timeout(self.timeout_seconds, partial(measure, self._config, self.rank_info))
        except MeasurementError as error:
            answer = error
        key = f"answer/{self._asked}/{self.rank_info.rank}"
        self._store.set(key, pickle.dumps(answer))  # type: ignore[arg-type]

    def _run_with_timeout(self, seconds: float, work: Callable[[], Value]) -> Value:
        thread = ThreadPoolExecutor(1, "answer", _choose_device, (self.rank_info.local_rank,))
        future = thread.submit(work)
        wait([future], seconds)
        if not future.done():  # the thread may hang for ever
            raise MeasurementError(f"not done within {seconds:g} s")
        try:
            return future.result()
        except REPORTED_ERRORS as error:
            raise MeasurementError(error_summary(error)) from None


def join_group(timeout_seconds: float, config: RunConfig, rank_info: RankInfo) -> None:
    """Join torch.distributed's process group as a run does: NCCL between GPUs, gloo between CPUs.

    The group gets a connection to the store of its own: a hanging call on a shared one would block the answers.
    """
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore("group", _connect(timeout_seconds, serve=False)),
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        timeout=timedelta(seconds=3 * timeout_seconds),  # longer than ours, which reports the rank at fault
    )


def _connect(timeout_seconds: float, serve: bool) -> Store:
    store = dist.TCPStore(  # type: ignore[attr-defined, unused-ignore]  # torch does not list it
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serve,
        timeout=timedelta(seconds=3 * timeout_seconds),
        wait_for_workers=False,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"doctor/{attempt}", store)


def _rank_0_unreachable(rank_info: RankInfo, where: str) -> BaseException:
    if rank_info.rank > 1:  # rank 1 reports it for all
        return SystemExit(EXIT_USER_ERROR)
    return UserError(f"rank 0 does not answer {where}; check that it runs and that its port can be reached")


def _choose_device(local_rank: int) -> None:
    if torch.cuda.is_available():  # a launcher may show each rank only its own GPU
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def _host_name(*_: object) -> str:
    """Return this host's name as Slurm knows it, or else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _measure_on(ranks: Sequence[int], measure: Measure[Value], config: RunConfig, rank_info: RankInfo) -> Value | None:
    return measure(config, rank_info) if rank_info.rank in ranks else None


def _end_session(*_: object) -> None:
    """Measure nothing: the answer shows that the end of the session was read."""
