"""Rank 0 asks and all ranks answer, each within a time: a rank that is dead, stopped or stuck is named, not waited for.

Questions and answers go by a store that rank 0 keeps, or torchrun: of a collective that does not end nobody can tell
who is missing. What answers a question runs in a thread, so that whatever it hangs in (a collective, a driver, a
file system) does not keep the rank from saying so.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tostlm.errors import EXIT_USER_ERROR, UserError, error_summary
from tostlm.launch import RankInfo

END = "end"
GRACE_SECONDS = 5.0  # for an answer to travel
POLL_SECONDS = 0.02
MENDABLE = (UserError, OSError, RuntimeError, MemoryError)  # a finding; anything else is a defect of this project


class Answer(NamedTuple):
    """What a rank measured, or why it could not; `stuck` where it was still at it when its time was over."""

    value: Any
    error: str = ""
    stuck: bool = False


class RankTimeout(Exception):
    """Ranks that did not answer in time."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(ranks)
        self.ranks = tuple(ranks)


class Coordinator:
    """This rank's end of the conversation.

    Attributes:
        hosts: the host of each rank; "" of one that has not arrived.

    Raises:
        UserError: rank 0 is not to be found.
    """

    def __init__(self, ranks: RankInfo, timeout_seconds: float) -> None:
        self.ranks, self.timeout_seconds = ranks, timeout_seconds
        self.hosts = [""] * ranks.world_size
        self._hand = self._free_hand()
        self._asked, self._silent = 0, set[int]()
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        met = self._within(timeout_seconds, self._connect)
        if met.stuck or met.error:
            if ranks.rank == 0:
                raise UserError(f"rank 0 cannot listen at {where} ({met.error or 'no answer'}); choose another port")
            raise _rank_0_is_silent(ranks, f"at {where}")
        self._store = met.value

    def _connect(self) -> dist.Store:
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=self.ranks.rank == 0 and not of_torchrun,
            timeout=timedelta(seconds=3 * self.timeout_seconds),
            wait_for_workers=False,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"doctor/{attempt}", store)

    def gather(self) -> None:
        """On rank 0: learn the hosts of all ranks.

        Raises:
            Silence: some did not arrive.
        """
        self._store.set("here/0", _host())
        missing = self._missing("here", time.monotonic() + self.timeout_seconds)
        for rank in set(range(self.ranks.world_size)) - set(missing):
            self.hosts[rank] = self._store.get(f"here/{rank}").decode()
        self._store.set("hosts", json.dumps(self.hosts))
        if missing:
            raise RankTimeout(missing)

    def ask(self, question: str, measures: Mapping[str, Callable[[], Any]]) -> list[Answer]:
        """On rank 0: the answers of all ranks, which work on them at the same time.

        Raises:
            Silence: some gave none.
        """
        self._asked += 1
        deadline = time.monotonic() + self.timeout_seconds + GRACE_SECONDS
        self._store.set(f"question/{self._asked}", question)
        self._answer(measures[question])
        missing = self._missing(f"answer/{self._asked}", deadline)
        if missing:
            raise RankTimeout(missing)
        texts = [self._store.get(f"answer/{self._asked}/{rank}") for rank in range(self.ranks.world_size)]
        return [Answer(*json.loads(text)) for text in texts]

    def end(self) -> None:
        """On rank 0, whose store it is: let the other ranks go; waits until those that speak have heard it."""
        self._asked += 1
        self._store.set(f"question/{self._asked}", END)
        self._answer(_nothing)
        self._missing(f"answer/{self._asked}", time.monotonic() + GRACE_SECONDS)

    def serve(self, measures: Mapping[str, Callable[[], Any]]) -> None:
        """On every other rank: answer what rank 0 asks until it has no more questions.

        Raises:
            UserError: rank 0 is silent; rank 1 says so.
        """
        self._store.set(f"here/{self.ranks.rank}", _host())
        self.hosts = json.loads(self._hear("hosts"))
        question = ""
        while question != END:
            self._asked += 1
            question = self._hear(f"question/{self._asked}").decode()
            self._answer(_nothing if question == END else measures[question])

    def _hear(self, key: str) -> bytes:
        """What rank 0 says, which may take as long as it waits for others."""
        heard = self._within(2 * self.timeout_seconds + GRACE_SECONDS, lambda: self._store.get(key))
        if heard.stuck or heard.error:
            raise _rank_0_is_silent(self.ranks, f"from {_host()}")
        return heard.value

    def _answer(self, measure: Callable[[], Any]) -> None:
        answer = self._within(self.timeout_seconds, measure)
        self._store.set(f"answer/{self._asked}/{self.ranks.rank}", json.dumps(answer))

    def _missing(self, prefix: str, deadline: float) -> list[int]:
        """The ranks whose keys are not there at the deadline; who was silent before is not waited for."""
        keys = {rank: f"{prefix}/{rank}" for rank in range(self.ranks.world_size) if rank not in self._silent}
        while not self._store.check(list(keys.values())):
            if time.monotonic() > deadline:
                self._silent = {rank for rank, key in keys.items() if not self._store.check([key])}
                return sorted(self._silent)
            time.sleep(POLL_SECONDS)
        return []

    def _within(self, seconds: float, work: Callable[[], Any]) -> Answer:
        doing = self._hand.submit(work)
        wait([doing], seconds)
        if not doing.done():
            self._hand = self._free_hand()  # the other may be held for ever
            return Answer(None, f"not done within {seconds:g} s", stuck=True)
        try:
            return Answer(doing.result())
        except MENDABLE as error:
            return Answer(None, error_summary(error))

    def _free_hand(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "answer", _choose_device, (self.ranks.local_rank,))

    @property
    def first_of_host(self) -> bool:
        """Whether this rank speaks for its host."""
        return self.hosts.index(self.hosts[self.ranks.rank]) == self.ranks.rank

    def connect_group(self) -> None:
        """Join torch.distributed's group, as a run does: NCCL between GPUs, gloo between CPUs.

        It has a connection to the store of its own: one that hangs would keep this rank's answers too.
        """
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore("group", self._store.clone()),
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            timeout=timedelta(seconds=3 * self.timeout_seconds),  # its end is ours to tell
        )


def _rank_0_is_silent(ranks: RankInfo, where: str) -> BaseException:
    if ranks.rank > 1:  # one says it
        return SystemExit(EXIT_USER_ERROR)
    return UserError(f"rank 0 does not answer {where}; see what became of it, and that its port can be reached")


def _nothing() -> None:
    pass


def _host() -> str:
    """This host as a launcher calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _choose_device(local_rank: int) -> None:
    if torch.cuda.is_available():  # a launcher may show each rank its own GPU alone
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
