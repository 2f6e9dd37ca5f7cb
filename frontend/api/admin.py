"""GET /health, /metrics and /version."""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

import cableway
from cableway.frontend.keys import ADMISSION, CONFIG, ENGINE, METRICS
from cableway.frontend.metrics import CONTENT_TYPE
from cableway.ipc.messages import Status

routes = web.RouteTableDef()

SILENCE_S = 5.0
"""A core answers each second's Ping; one that has not for so long is stuck or gone."""


@routes.get("/health")
async def health(request: web.Request) -> web.Response:
    """200 only while requests make progress; tells how old the last finished step is, and of whom.

    `/health?live` asks only whether this process answers: what a probe that restarts the server should look at.
    """
    app = request.app
    if "live" in request.query:
        return web.json_response({"status": "live"})
    engines = {
        engine: _engine_health(status, age_s, app[CONFIG].step_timeout_s)
        for engine, (status, age_s) in app[ENGINE].statuses().items()
    }
    states = [health["state"] for health in engines.values()]
    state = "draining" if app[ADMISSION].is_draining else next((state for state in states if state != "ok"), "ok")
    return web.Response(
        status=200 if state == "ok" else 503,
        body=msgspec.json.encode(
            {"status": state, "frontend": {"active_requests": app[ADMISSION].num_active}, "engines": engines}
        ),
        content_type="application/json",
        headers={} if state == "ok" else {"Retry-After": "1"},
    )


@routes.get("/metrics")
async def show_metrics(request: web.Request) -> web.Response:
    metrics = request.app[METRICS]
    metrics.flush()
    # In a thread: it reads the files of every frontend.
    return web.Response(body=await asyncio.to_thread(metrics.render), headers={"Content-Type": CONTENT_TYPE})


@routes.get("/version")
async def version(_: web.Request) -> web.Response:
    return web.Response(body=msgspec.json.encode({"version": cableway.__version__}), content_type="application/json")


def _engine_health(status: Status | None, age_s: float, step_timeout_s: float) -> dict[str, Any]:
    """`state`: ok; starting (no core, or its workers are not up); asleep; stuck (silent, or a step without an end)."""
    if status is None:
        return {"state": "starting", "core_age_s": round(age_s, 3)}
    if age_s > SILENCE_S or status.step_age_s > step_timeout_s:
        state = "stuck"
    elif status.asleep:
        state = "asleep"
    else:
        state = "ok" if status.ready else "starting"
    return {
        "state": state,
        "core_age_s": round(age_s, 3),
        "step_age_s": round(status.step_age_s, 3),
        "worker_step_ages_s": [round(worker_age_s, 3) for worker_age_s in status.worker_step_ages_s],
        "steps": status.steps,
        "running": status.num_running,
        "waiting": status.num_waiting,
    }
