"""POST /v1/chat/completions through the real client."""

import openai
from tests.frontend.conftest import MODEL, Frontend


def test_a_streamed_chat(frontend: Frontend, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say: héllo 👋 wörld"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    print(chunks)
