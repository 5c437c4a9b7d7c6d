"""How a command is told that it is one of several processes. This module does not import JAX."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from cifar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes, which train one run together. Each runs the same command with its own --process-id."""

    coordinator: str | None = None
    """Address of process 0, HOST:PORT, with a free port; auto: let JAX find it; none: train without other processes.
    SLURM steps, Open MPI 4 and TPU pods with TPU_WORKER_HOSTNAMES (GKE) are found without this flag."""
    num_processes: int | None = None
    """Number of processes. Needs --coordinator HOST:PORT."""
    process_id: int | None = None
    """Number of this process, from 0. Needs --coordinator HOST:PORT."""

    def __post_init__(self) -> None:
        address, count, number = self.coordinator, self.num_processes, self.process_id
        if address in (None, "auto", "none"):
            if (count, number) != (None, None):
                raise UserError("--num-processes and --process-id need --coordinator HOST:PORT")
            return
        host, colon, port = str(address).rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(f"--coordinator {address}: must be HOST:PORT, auto or none")
        if count is None or number is None:
            raise UserError("--coordinator HOST:PORT needs --num-processes and --process-id")
        if not 0 <= number < count:
            raise UserError(f"--process-id {number}: must be from 0 to {count - 1}, as --num-processes is {count}")


def is_clusters_process(environment: Mapping[str, str]) -> bool:
    """Tells whether a cluster started several processes that JAX can connect.

    These are a SLURM step of several tasks, Open MPI 4 (later ones don't tell JAX the address), and a TPU pod that
    names its hosts.
    """
    counts = [environment.get("SLURM_STEP_NUM_TASKS", "1")]
    if "OMPI_MCA_orte_hnp_uri" in environment:
        counts.append(environment.get("OMPI_COMM_WORLD_SIZE", "1"))
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(hosts) > 1 or any(count.isdecimal() and int(count) > 1 for count in counts)


def silence_xla(arguments: Sequence[str]) -> None:
    """Hides XLA's messages from one of several processes. Call it before JAX is imported.

    Otherwise XLA prints pages when another process dies. An exception, or `processes.connected`, says it in a line.
    """
    if is_clusters_process(os.environ) or any(word.partition("=")[0] == "--coordinator" for word in arguments):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "4")
