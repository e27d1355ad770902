"""Questions about paragraphs with the features of TFDS's `squad`, written without TensorFlow."""

import numpy as np
import tensorflow_datasets as tfds

# Unregistered, a name means what lies in data_dir, as for data that came from elsewhere.
with tfds.core.registered.skip_registration():

    class QuestionsV1(tfds.core.GeneratorBasedBuilder):
        """Written from `questions` (`jaxrmils.data.Question`) as "validation"."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, *, questions, **kwargs):
            self.questions = questions
            super().__init__(**kwargs)

        def _info(self):
            answers = {"text": tfds.features.Text(), "answer_start": np.int32}
            features = {
                "id": tfds.features.Text(),
                "title": tfds.features.Text(),
                "context": tfds.features.Text(),
                "question": tfds.features.Text(),
                "answers": tfds.features.Sequence(answers),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), description="Questions."
            )

        def _split_generators(self, dl_manager):
            return {"validation": self._generate_examples()}

        def _generate_examples(self):
            for question in self.questions:
                yield (
                    question.id,
                    {
                        "id": question.id,
                        "title": "title",
                        "context": question.context,
                        "question": question.text,
                        "answers": [
                            {"text": text, "answer_start": start}
                            for text, start in question.answers
                        ],
                    },
                )
