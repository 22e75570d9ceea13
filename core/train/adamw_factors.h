// AdamWStep (training_ops.h) as the factors that every element is updated with; plain data, shared
// with kernels.
#ifndef QUANTMILL_CORE_TRAIN_ADAMW_FACTORS_H_
#define QUANTMILL_CORE_TRAIN_ADAMW_FACTORS_H_

namespace quantmill {

// Rounded to f32 once:
//   m = beta1 m + rest1 g;  v = beta2 v + rest2 g^2;  p = keep p - rate m / (sqrt(v) root +
//   epsilon);  average = average_keep average + average_rest p
struct AdamWFactors {
  float beta1, rest1, beta2, rest2, keep, rate, root, epsilon, gradient_scale, average_keep,
      average_rest;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TRAIN_ADAMW_FACTORS_H_
