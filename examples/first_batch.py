"""A batch of mosaics from generated photos: the first lines to try, on any machine and without data."""

from tempfile import mkdtemp

from nemo_dali import Loader, MosaicPolicy
from nemo_dali.data import index_dataset, read_annotations
from nemo_dali.synthetic import synthesize

folder = mkdtemp()
synthesize(folder, images=40)
photos = f"{folder}/images/mscoco/images/train2014"
annotations = read_annotations(folder, dataset="refcoco", split_by="unc", split="train", images=photos)
index_dataset(annotations, images=photos, output=f"{folder}/train.ris.h5")

loader = Loader(f"{folder}/train.ris.h5", batch_size=4, policy=MosaicPolicy(p_mined=0, p_random=1), seed=0)
for batch in loader:
    print(batch.sentences[0], batch.image.shape, batch.mask.shape, batch.tokens.shape)
    break
