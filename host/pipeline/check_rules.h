// Rules over a whole plan: what shapes, the export target and tensor parallelism allow.
#ifndef QUANTMILL_HOST_PIPELINE_CHECK_RULES_H_
#define QUANTMILL_HOST_PIPELINE_CHECK_RULES_H_

#include "host/pipeline/plan.h"
#include "host/pipeline/section.h"
#include "host/plugins/catalog.h"

namespace quantmill {

// A group must divide the input features of its slot; the error lists sizes that do.
void CheckGroupSizes(const PipelinePlan& plan, ErrorList* errors);
// Every rank of `export.tensor_parallel` must get whole heads, features and groups.
void CheckTensorParallel(const PipelinePlan& plan, ErrorList* errors);
// Readers of gptq, awq and compressed-tensors files (vLLM) load q/k/v, gate/up and the experts of a
// layer as one parameter each: their members must be packed alike.
void CheckFusedGroups(const PipelinePlan& plan, ErrorList* errors);
// awq files have no place for the order of groups that act-order leaves.
void CheckActOrder(const PipelinePlan& plan, ErrorList* errors);
// The target is known, somebody installed can write it, and there is something to write.
void CheckExportTarget(const PipelinePlan& plan, const Catalog& catalog, ErrorList* errors);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_CHECK_RULES_H_
