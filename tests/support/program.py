"""A program of somebody else, run to its end beside a stack."""

import asyncio
import os
from pathlib import Path


async def output_of(*command: str | Path, cwd: Path, within_s: float = 60, **env: str) -> str:
    """What it wrote to stdout. It gets no setting of this process but PATH. Fails with its stderr if it does."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), **env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(within_s):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        out, err = await process.communicate()
    assert process.returncode == 0, (out + err).decode()
    return out.decode()
