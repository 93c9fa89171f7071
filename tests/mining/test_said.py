"""Photos that another sentence says to show what a sentence describes."""

from nemo_dali.data.dataset import Dataset
from nemo_dali.mining.said import Said
from tests.helpers.files import index_refer
from tests.helpers.said import by_definition, say


def test_photos_are_those_whose_sentences_have_all_the_words(tmp_path):
    dataset = Dataset.open(index_refer(tmp_path, photos=30, edit=say))
    said, own = Said(dataset), dataset.refs.image[dataset.sentences.ref]
    sizes = []
    for sentence in range(len(own)):
        found, expected = said.photos(sentence), by_definition(dataset, sentence)
        assert (found is None) == (expected is None)
        if expected is not None:
            assert found.tolist() == expected and own[sentence] in expected
            sizes.append(len(expected))
    assert len(set(sizes)) > 2 and len(sizes) < len(own)


def test_without_categories_nothing_is_said(tmp_path):
    def forget(refs, instances):
        instances["categories"] = []

    said = Said(Dataset.open(index_refer(tmp_path, edit=forget)))
    assert all(said.photos(sentence) is None for sentence in range(5))
