from support.nats import NatsServer


def test_a_restart_keeps_port_and_ends_clean(nats_server: NatsServer) -> None:
    url, first = nats_server.url, nats_server.pid
    nats_server.restart()
    assert nats_server.url == url
    assert nats_server.pid != first
