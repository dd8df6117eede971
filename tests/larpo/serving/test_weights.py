"""How a server is told of new weights."""

from larpo.serving.settings import server_settings
from larpo.serving.weights import ServedWeights


def test_a_server_that_the_command_starts_is_no_process_of_the_loop(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "LARPO_OF_THE_USER"):
        monkeypatch.setenv(name, "1")
    settings = server_settings({"base_url": "http://a/v1", "model": "m", "reload_command": f"env > {tmp_path}/seen"})
    assert ServedWeights(settings).tell("/a/model", 1)
    seen = {line.partition("=")[0] for line in (tmp_path / "seen").read_text().splitlines()}
    assert "LARPO_OF_THE_USER" in seen and not seen & {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
