"""Names the correspondences, as `MatchingConfig.correspondence` does."""

from student_train.config.objective import CorrespondenceName
from student_train.matching.correspondences.chance import chance
from student_train.matching.correspondences.greedy import greedy
from student_train.matching.correspondences.hungarian import hungarian
from student_train.matching.correspondences.local import local
from student_train.matching.correspondences.nearest import nearest
from student_train.matching.correspondences.pairing import Correspondence
from student_train.matching.correspondences.spatial import spatial

CORRESPONDENCES: dict[CorrespondenceName, Correspondence] = {
    "hungarian": hungarian,
    "local": local,
    "spatial": spatial,
    "greedy": greedy,
    "nearest": nearest,
    "random": chance,
}
