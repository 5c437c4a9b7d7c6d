"""How a command is told that it is one of several processes. This module does not import JAX."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
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


def refuse_unknown_launcher(environment: Mapping[str, str]) -> None:
    """Raises: UserError for one of several processes of Open MPI 5 or later, each of which would train by itself."""
    count = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if count.isdecimal() and int(count) > 1 and not is_clusters_process(environment):
        raise UserError(
            f"this is one of {count} processes of mpirun, which JAX can't connect by itself: start each by sh -c with "
            "--coordinator HOST:PORT --num-processes $OMPI_COMM_WORLD_SIZE --process-id $OMPI_COMM_WORLD_RANK, or "
            "with --coordinator none, if each is to train alone"
        )


def check_port(processes: Processes) -> None:
    """Raises: UserError if a program of this host uses the coordinator's port. JAX would crash or join its run."""
    port = int(str(processes.coordinator).rpartition(":")[2])
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        socket.create_server(("", port), **both).close()  # type: ignore[arg-type]
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = "another program uses this port" if error.errno == errno.EADDRINUSE else "this port is not allowed"
            raise UserError(f"--coordinator {processes.coordinator}: {reason}: name another in all processes") from None


def silence_xla(arguments: Sequence[str]) -> None:
    """Hides XLA's messages from one of several processes. Call it before JAX is imported.

    Otherwise XLA prints pages when another process dies. An exception, or `processes.connected`, says it in a line.
    """
    if is_clusters_process(os.environ) or any(word.partition("=")[0] == "--coordinator" for word in arguments):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "4")
