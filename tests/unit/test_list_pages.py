"""Pages of OpenAI's lists."""

from forebay_api.openai.lists import page


def test_pages_come_to_an_end_although_two_items_have_one_id() -> None:
    items = [{"id": name} for name in "abab"]
    seen, after = [], ""
    while (found := page(items, 1, "asc", after))["has_more"]:
        after = found["last_id"]
        seen.append(after)
    assert seen == ["a"]
    assert found["last_id"] == "b"
