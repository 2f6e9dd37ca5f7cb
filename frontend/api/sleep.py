"""POST /sleep and /wake_up, and GET /is_sleeping: the memory of a GPU, lent to somebody else for a while.

Only where `--enable-sleep-mode` is given. Requests that run, and those that come, wait until the engine is awake.
"""

import msgspec
from aiohttp import web

from cableway.frontend.errors import RequestError
from cableway.frontend.keys import ENGINE

routes = web.RouteTableDef()


@routes.post("/sleep")
async def sleep(request: web.Request) -> web.Response:
    """Level 1: weights wait in the host's memory, the KV cache is dropped. 200 when the memory is free."""
    if request.query.get("level", "1") != "1":
        raise RequestError(400, "level has to be 1: weights go to the host's memory.", param="level")
    await request.app[ENGINE].set_asleep(True)
    return web.Response()


@routes.post("/wake_up")
async def wake_up(request: web.Request) -> web.Response:
    """200 when the engine computes again."""
    await request.app[ENGINE].set_asleep(False)
    return web.Response()


@routes.get("/is_sleeping")
async def is_sleeping(request: web.Request) -> web.Response:
    asleep = await request.app[ENGINE].are_asleep()
    return web.Response(body=msgspec.json.encode({"is_sleeping": asleep}), content_type="application/json")
